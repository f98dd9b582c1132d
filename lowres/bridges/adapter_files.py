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
        InputError: Naming what is missing and what is left over.
    """
    from peft import peft_model

    if not any(folder.glob("adapter_model.*")):
        text = "it has no adapter_model.safetensors; take the folder `model` of a run that ended"
        raise InputError("the adapter", [Problem(str(folder), text)])
    put = peft_model.set_peft_model_state_dict

    def checked(model: Any, state: dict[str, torch.Tensor], *how: Any, **more: Any) -> Any:
        # PEFT 0.21 warns of what is missing, and is silent about what is left over.
        problem = other_names(as_written(model), state)
        if problem is not None:
            text = (
                f"{problem}; it was saved for another model or method, or by another version: take "
                "the folder `model` of a run of this recipe"
            )
            raise InputError("the adapter", [Problem(str(folder), f"it {text}")])
        return put(model, state, *how, **more)

    with mock.patch.object(peft_model, "set_peft_model_state_dict", checked):
        yield
