"""What a plan reads from DeepSpeed's settings, and which of them it cannot plan.

Source: deepspeed 0.19, runtime/zero/config.py and offload_config.py (names and defaults);
accelerate 1.15, accelerator.py (`_prepare_deepspeed`): `auto` made from the hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowres.core.errors import NotPlanned

_BUCKET_ELEMENTS = 500_000_000
_SAME_BYTES = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "steps_per_print", "wall_clock_breakdown", "dump_state",
    "memory_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "bf16.enabled", "zero_optimization.stage", "zero_optimization.allgather_bucket_size",
    "zero_optimization.allgather_partitions", "zero_optimization.load_from_fp32_weights",
    "zero_optimization.ignore_unused_parameters", "zero_optimization.elastic_checkpoint",
    "zero_optimization.offload_optimizer.buffer_count",
    "zero_optimization.offload_optimizer.fast_init",
    "zero_optimization.offload_optimizer.nvme_path",
})  # fmt: skip
"""The recipe's own, and what changes no tensor; the last three are read for a disk alone."""
_READ = frozenset({
    "zero_optimization.reduce_bucket_size", "zero_optimization.overlap_comm",
    "zero_optimization.offload_optimizer.device", "zero_optimization.offload_optimizer.pin_memory",
})  # fmt: skip
_PLANNED_AT: Mapping[str, Any] = {
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "zero_optimization.contiguous_gradients": True,
    "zero_optimization.reduce_scatter": True,
    "zero_optimization.round_robin_gradients": False,
    "zero_optimization.use_multi_rank_bucket_allreduce": True,
    "zero_optimization.parameter_alignment": False,
    "zero_optimization.compute_grad_norm": True,
    "zero_optimization.legacy_stage1": False,
    "zero_optimization.offload_param.device": "none",
}
"""DeepSpeed's defaults; another value changes what is held in a way that is not planned."""


@dataclass(frozen=True)
class Settings:
    """Of stages 1 and 2, what tensors depend on.

    Args:
        offload: States and the update are in host memory.
        pinned: That memory is page-locked.
        overlap: Two buckets, of which one is filled while the other is reduced.
    """

    stage: int
    offload: bool
    pinned: bool
    overlap: bool
    bucket: int | str

    def bucket_elements(self, model: Any) -> int:
        """Gradients that are reduced together; `auto` is the square of a model's hidden size.

        Raises:
            NotPlanned: Where the model names none.
        """
        if self.bucket != "auto":
            return int(self.bucket)
        config = getattr(model, "config", None)
        hidden = getattr(config, "hidden_size", None) or max(
            getattr(config, "hidden_sizes", None) or [0]
        )
        if not hidden:
            raise NotPlanned(
                'zero_optimization.reduce_bucket_size "auto" is made from a hidden size, which the '
                "model's configuration does not name; say a number"
            )
        return int(hidden) ** 2


def planned_settings(settings: Mapping[str, Any]) -> Settings:
    """What a plan needs of DeepSpeed's settings.

    Raises:
        NotPlanned: Where one changes what is held and is not planned; names it.
    """
    zero = settings["zero_optimization"]
    offloaded = zero.get("offload_optimizer") or {}
    places = {(zero.get(key) or {}).get("device") for key in ("offload_optimizer", "offload_param")}
    if "nvme" in places:
        raise NotPlanned(
            "offloading to nvme is not planned: DeepSpeed's buffers between disk and host were not "
            "compared with a run"
        )
    if zero["stage"] == 3:
        raise NotPlanned("of DeepSpeed's buffers those of stages 1 and 2 are planned, not stage 3")
    for key, value in _given(settings):
        if key in _SAME_BYTES | _READ:
            continue
        if key not in _PLANNED_AT or value != _PLANNED_AT[key]:
            raise NotPlanned(_not_known(key, value))
    overlap = bool(zero.get("overlap_comm"))
    if overlap and zero["stage"] == 1:
        raise NotPlanned(_not_known("zero_optimization.overlap_comm", True) + " at stage 1")
    return Settings(
        stage=zero["stage"],
        offload=offloaded.get("device", "none") == "cpu",
        pinned=bool(offloaded.get("pin_memory", True)),
        overlap=overlap,
        bucket=zero.get("reduce_bucket_size", _BUCKET_ELEMENTS),
    )


def _not_known(key: str, value: Any) -> str:
    return f"what {key} {json.dumps(value)} changes in DeepSpeed's memory is not planned"


def _given(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values; what is left to DeepSpeed or is switched off says nothing.

    fp16 is never on: `loop.precision` decides, and is refused there.
    """
    for key, value in settings.items():
        switched_off = isinstance(value, Mapping) and value.get("enabled") is False
        if value is None or key == "fp16" or switched_off:
            continue
        if isinstance(value, Mapping):
            yield from _given(value, f"{above}{key}.")
        else:
            yield above + key, value
