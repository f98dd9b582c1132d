"""What PEFT looks for in the file of an adapter, which it loads with a warning where some lacks."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from lowres.core.errors import InputError, Problem, some

if TYPE_CHECKING:
    import torch
    from torch import nn


def as_written(model: nn.Module, state: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of an adapter under the names that a file has, which loading looks for.

    Args:
        state: Of the whole model, with the adapter, in place of `model.state_dict()`.
    """
    import peft

    # Embeddings are never resized here; PEFT would ask the hub for the base's config to find out.
    named: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(
        model, state_dict=state, save_embedding_layers=False
    )
    return named


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """Those that are written as they are, trained and frozen ones; not what prompts are made of."""
    from torch import nn

    written = as_written(model, model.state_dict(keep_vars=True))
    return [tensor for tensor in written.values() if isinstance(tensor, nn.Parameter)]


def other_names(wanted: Collection[str], there: Collection[str]) -> str | None:
    """What is odd about the names in a file, to follow its path; None where they are as wanted."""
    missing, unexpected = sorted(set(wanted) - set(there)), sorted(set(there) - set(wanted))
    said = []
    if missing:
        said.append(f"lacks {len(missing)} of {len(wanted)} tensors: {some(missing)}")
    if unexpected:
        said.append(f"holds {len(unexpected)} that no one looks for: {some(unexpected)}")
    return "; it ".join(said) or None


@contextlib.contextmanager
def all_found(folder: Path) -> Iterator[None]:
    """While it lasts, an adapter is loaded with all names that PEFT looks for, or not at all.

    Raises:
        InputError: When a file is missing or damaged, when the adapter finds no place in the model,
            and naming what is missing, what is left over or the first of other sizes.
    """
    from peft import peft_model

    _stop_at_damaged(folder)
    put = peft_model.set_peft_model_state_dict

    def checked(model: Any, state: dict[str, torch.Tensor], *how: Any, **more: Any) -> Any:
        # PEFT 0.21 warns of what is missing, and is silent about what is left over.
        wanted = _shapes_wanted(model)
        problem = other_names(wanted, state)
        if problem is not None:
            raise _refused(folder, f"it {problem}; {_OTHER}")
        other = [n for n, shape in wanted.items() if tuple(state[n].shape) != shape]
        if other:
            name, more_of_them = other[0], f" (and {len(other) - 1} more)" if other[1:] else ""
            sizes = f"{_times(state[name].shape)}, wanted {_times(wanted[name])}{more_of_them}"
            raise _refused(folder, f"it is of another model: {name} is {sizes}; {_OTHER}")
        return put(model, state, *how, **more)

    with mock.patch.object(peft_model, "set_peft_model_state_dict", checked):
        try:
            yield
        except ValueError as error:
            # PEFT looks for the layers of its configuration before any tensor is read.
            first = str(error).strip().partition("\n")[0]
            raise _refused(folder, f"it finds no place in the model: {first}; {_OTHER}") from error


_OTHER = (
    "it was saved for another model or method, or by another version: take the folder `model` of a "
    "run of this recipe"
)


def _refused(where: Path, text: str) -> InputError:
    return InputError("the adapter", [Problem(str(where), text)])


def _stop_at_damaged(folder: Path) -> None:
    """Raise InputError when a file cannot be read; of the tensors' file the header alone is."""
    from peft import PeftConfig
    from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
    from safetensors import SafetensorError, safe_open

    again = "copy it again from the folder `model` of the run"
    try:
        if not PeftConfig.from_pretrained(str(folder)).peft_type:
            raise KeyError("peft_type")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"it is no configuration of an adapter ({type(error).__name__}: {error}); {again}"
        raise _refused(folder / CONFIG_NAME, text) from error
    if not any(folder.glob("adapter_model.*")):
        text = "it has no adapter_model.safetensors; take the folder `model` of a run that ended"
        raise _refused(folder, text)
    file = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        with contextlib.nullcontext() if not file.exists() else safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise _refused(file, f"it is damaged or cut off ({error}); {again}") from error


def _shapes_wanted(model: Any) -> dict[str, tuple[int, ...]]:
    wanted = {name: tuple(tensor.shape) for name, tensor in as_written(model).items()}
    if model.active_peft_config.peft_type in ("PROMPT_TUNING", "P_TUNING"):
        # Their vectors are made as wide as the configuration says, whatever the model.
        length, _ = wanted["prompt_embeddings"]
        wanted["prompt_embeddings"] = length, model.word_embeddings.weight.shape[1]
    return wanted


def _times(shape: Collection[int]) -> str:
    return "x".join(str(size) for size in shape) or "a number"
