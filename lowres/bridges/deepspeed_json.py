"""A DeepSpeed JSON beside a recipe: read, and held against what the recipe says itself.

Source: accelerate 1.15, utils/dataclasses.py (`DeepSpeedPlugin`) and accelerator.py
(`_prepare_deepspeed`): which `auto` values are filled in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowres.core.errors import InputError, Problem

if TYPE_CHECKING:
    from lowres.core.recipe import Recipe

_OWN_AUTOCAST = ("amp", "torch_autocast")
_TAKEN_OVER = {
    "optimizer": "the recipe's optimizer updates",
    "scheduler": "loop.schedule and loop.warmup_ratio set the learning rate",
}
_FILLED_IN = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "fp16.enabled", "bf16.enabled", "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
})  # fmt: skip


def settings_from(path: str) -> dict[str, Any]:
    """A DeepSpeed JSON.

    Raises:
        InputError: Where it cannot be read or asks for no ZeRO stage.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise _refusal(f"'{path}': {error.strerror}") from None
    except ValueError as error:
        raise _refusal(f"'{path}' is no JSON: {error}") from None
    zero = found.get("zero_optimization") if isinstance(found, dict) else None
    if not isinstance(zero, dict):
        raise _refusal(f"'{path}' has no section zero_optimization, so it asks for no ZeRO stage")
    stage = zero.get("stage")
    if type(stage) is not int or stage not in (1, 2, 3):
        raise _refusal(f"'{path}' says zero_optimization.stage {json.dumps(stage)}; say 1, 2 or 3")
    return dict(found)


def _refusal(text: str) -> InputError:
    return InputError("the recipe", [Problem("levers", f"'zero': {text}")])


def contradictions(settings: Mapping[str, Any], recipe: Recipe, processes: int) -> Iterator[str]:
    """What a JSON says that the recipe says otherwise, or that nothing would fill in.

    Args:
        processes: That share the updates.
    """
    for key, ours in _TAKEN_OVER.items():
        if key in settings:
            yield f"its JSON has a section '{key}', and {ours}; take the section out"
    loop = recipe.loop
    rows = loop.micro_batch_size * processes
    share = f"loop.global_batch_size {loop.global_batch_size}"
    told: tuple[tuple[str, Any, str], ...] = (
        ("train_micro_batch_size_per_gpu", loop.micro_batch_size,
         f"loop.micro_batch_size is {loop.micro_batch_size}"),
        ("train_batch_size", loop.global_batch_size, share.replace("size ", "size is ")),
        ("gradient_accumulation_steps", loop.global_batch_size / rows,
         f"{share} over {rows} rows in memory (loop.micro_batch_size times processes) makes "
         f"{loop.global_batch_size / rows:g}"),
        ("gradient_clipping", loop.max_grad_norm or 0,
         f"loop.max_grad_norm is {loop.max_grad_norm or 'null'}"),
        ("bf16.enabled", loop.precision == "bf16", f"loop.precision is '{loop.precision}'"),
        ("fp16.enabled", loop.precision == "fp16", f"loop.precision is '{loop.precision}'"),
    )  # fmt: skip
    for key, ours, why in told:
        said = _value(settings, key)
        if said not in (None, "auto", ours):
            yield f'its JSON says {key} {json.dumps(said)}, and {why}; say "auto" there'
    for key in _OWN_AUTOCAST:
        if _value(settings, f"{key}.enabled"):
            yield f"its JSON asks for '{key}', and loop.precision decides; take the section out"
    for key in _autos({k: v for k, v in settings.items() if k not in _TAKEN_OVER}):
        if key not in _FILLED_IN:
            yield f'its JSON says {key} "auto", which nothing fills in; say a value'


def _value(settings: Any, key: str) -> Any:
    """What stands at a dotted key; None where nothing does."""
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, Mapping) else None
    return settings


def _autos(settings: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _autos(value, f"{above}{key}.")
        elif value == "auto":
            yield above + key
