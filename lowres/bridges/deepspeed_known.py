"""What of a DeepSpeed JSON lowres hands on, and what it refuses by name.

DeepSpeed 0.19 reads what it knows and passes over the rest, so a misspelt key would change nothing
and say nothing.

Source: deepspeed 0.19, runtime/config.py (sections) and runtime/zero/config.py
(`DeepSpeedZeroConfig`, which names and types the keys of `zero_optimization`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from lowres.bridges import quiet
from lowres.core.registry import did_you_mean

_SECTIONS = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "bf16", "fp16", "amp", "torch_autocast", "optimizer", "scheduler",
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level",
    "comms_logger",
})  # fmt: skip
"""Carried out by a run, or held against the recipe."""
_ONLY: Mapping[str, tuple[Any, str]] = {
    "zero_force_ds_cpu_optimizer": (False, "the recipe's optimizer updates, also on the host"),
    "communication_data_type": (None, "gradients are sent in the type that they have"),
    "prescale_gradients": (False, "lowres divides the loss by the tokens of the update"),
    "gradient_predivide_factor": (1.0, "lowres divides the loss by the tokens of the update"),
    "zero_optimization.zero_quantized_weights": (False, "'zero' is exact, and this rounds"),
    "zero_optimization.zero_quantized_nontrainable_weights":
        (False, "'zero' is exact, and this rounds"),
    "zero_optimization.zero_quantized_gradients": (False, "'zero' is exact, and this rounds"),
    "zero_optimization.zenflow": (None, "it updates late what 'zero' updates at once"),
}  # fmt: skip
"""The one value that a run can have, and why."""


def unknown(settings: Mapping[str, Any]) -> Iterator[str]:
    """What DeepSpeed would pass over, refuse with a traceback, or do otherwise than the recipe."""
    for key, value in settings.items():
        if key not in _SECTIONS and not _is_off(value):
            hint = did_you_mean(key, _SECTIONS) or "; take it out"
            yield f"its JSON says '{key}', which is not handed on to DeepSpeed{hint}"
    for key, (only, why) in _ONLY.items():
        *above, last = key.split(".")
        place = settings[above[0]] if above else settings
        if last in place and place[last] != only and not _is_off(place[last]):
            yield f"its JSON says {key} {json.dumps(place[last])}, and {why}; take it out"
    yield from _wrong_in_zero(settings["zero_optimization"])


def _wrong_in_zero(zero: Mapping[str, Any]) -> Iterator[str]:
    """By DeepSpeed's own model of the section."""
    with quiet.deepspeed():
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    given = {key: value for key, value in zero.items() if value != "auto"}
    fields = DeepSpeedZeroConfig.model_fields
    known = [*fields, *(field.alias for field in fields.values() if field.alias)]
    try:
        DeepSpeedZeroConfig(**given)
    except ValidationError as error:
        for wrong in error.errors():
            key = ".".join(("zero_optimization", *map(str, wrong["loc"])))
            if wrong["type"] == "extra_forbidden":
                near = did_you_mean(str(wrong["loc"][-1]), known) if len(wrong["loc"]) == 1 else ""
                yield f"its JSON says {key}, which DeepSpeed does not know{near or '; take it out'}"
            else:
                said = json.dumps(wrong["input"], default=str)
                yield f"its JSON says {key} {said}, and DeepSpeed: {wrong['msg']}"


def _is_off(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and value.get("enabled") is False)
