"""What a plan reads from DeepSpeed's settings, and which of them it cannot plan.

Source: deepspeed 0.19, runtime/zero/config.py and offload_config.py (names and defaults);
accelerate 1.15, accelerator.py (`_prepare_deepspeed`): `auto` made from the hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowres.bridges.deepspeed_buffers import Disk, disk_of
from lowres.core.errors import NotPlanned

SUB_GROUP_ELEMENTS = 1_000_000_000
_BUCKET_ELEMENTS = 500_000_000
_SAME_BYTES = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "steps_per_print", "wall_clock_breakdown", "dump_state",
    "memory_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "bf16.enabled", "zero_optimization.stage", "zero_optimization.allgather_bucket_size",
    "zero_optimization.allgather_partitions", "zero_optimization.load_from_fp32_weights",
    "zero_optimization.ignore_unused_parameters", "zero_optimization.elastic_checkpoint",
    "zero_optimization.offload_optimizer.buffer_count",
    "zero_optimization.offload_optimizer.nvme_path",
    "aio.queue_depth", "aio.single_submit", "aio.overlap_events",
})  # fmt: skip
"""The recipe's own, and what changes no tensor."""
_OF_STATES_ON_DISK = frozenset({
    f"zero_optimization.offload_optimizer.{key}"
    for key in ("fast_init", "pipeline_read", "pipeline_write")
})  # fmt: skip
"""Read for those alone."""
_READ = frozenset({
    "zero_optimization.reduce_bucket_size", "zero_optimization.overlap_comm",
    "zero_optimization.offload_optimizer.device", "zero_optimization.offload_optimizer.pin_memory",
})  # fmt: skip
_STAGE_3: Mapping[str, int] = {
    "sub_group_size": SUB_GROUP_ELEMENTS,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}
"""What stage 3 reads beside, with DeepSpeed's defaults."""
_READ_AT_3 = frozenset({
    *(f"zero_optimization.{key}" for key in _STAGE_3),
    "zero_optimization.offload_param.device", "zero_optimization.offload_param.pin_memory",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.offload_param.buffer_count", "zero_optimization.offload_param.buffer_size",
    "zero_optimization.offload_param.max_in_cpu", "zero_optimization.offload_param.nvme_path",
    "aio.block_size", "aio.intra_op_parallelism",
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
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": False,
    "zero_optimization.stage3_allgather_sequential": False,
    "zero_optimization.stage3_module_granularity_threshold": 0,
    "zero_optimization.zero_hpz_partition_size": 1,
    "zero_optimization.zero_quantized_weights": False,
    "zero_optimization.zero_quantized_nontrainable_weights": False,
    "zero_optimization.zero_quantized_gradients": False,
    "zero_optimization.legacy_stage1": False,
    "zero_optimization.memory_efficient_linear": True,
    "zero_optimization.offload_optimizer.ratio": 1.0,
    "zero_optimization.offload_optimizer.fast_init": False,
    "zero_optimization.offload_optimizer.pipeline_read": False,
    "zero_optimization.offload_optimizer.pipeline_write": False,
    "zero_optimization.offload_param.device": "none",
    "aio.use_gds": False,
}
"""DeepSpeed's defaults; another value changes what is held in a way that is not planned."""


@dataclass(frozen=True)
class Settings:
    """What tensors depend on.

    Args:
        offload: The update is in host memory, and states are there or on the disk.
        pinned: That memory is page-locked.
        disk: What lies there, and its buffers.
        overlap: At stages 1 and 2 two buckets, of which one is filled while the other is reduced.
        divided: What stage 3 reads beside, by its key.
    """

    stage: int
    offload: bool
    pinned: bool
    overlap: bool
    bucket: int | str
    offload_parameters: bool = False
    pinned_parameters: bool = False
    divided: Mapping[str, int | str] = field(default_factory=dict)
    disk: Disk = Disk()

    def bucket_elements(self, model: Any) -> int:
        """Gradients that are reduced together."""
        return int(hidden_size(model) ** 2 if self.bucket == "auto" else self.bucket)

    def prefetch_elements(self, model: Any) -> int:
        """Parameters that are fetched ahead together."""
        found = self.divided["stage3_prefetch_bucket_size"]
        return int(0.9 * hidden_size(model) ** 2 if found == "auto" else found)

    def staying_elements(self, model: Any) -> int:
        """Of the largest parameter that is not divided while forward and backward passes go on."""
        return staying_elements(self.divided, model)


def staying_elements(zero: Mapping[str, Any], model: Any) -> int:
    """See `Settings.staying_elements`.

    Args:
        zero: The section zero_optimization.
    """
    key = "stage3_param_persistence_threshold"
    found = zero.get(key, _STAGE_3[key])
    return int(10 * hidden_size(model) if found == "auto" else found)


def hidden_size(model: Any) -> int:
    """What accelerate makes of a model for `auto`.

    Raises:
        NotPlanned: Where the model names none.
    """
    config = getattr(model, "config", None)
    sizes = [
        getattr(config, "hidden_size", None) or 0,
        *(getattr(config, "hidden_sizes", ()) or ()),
    ]
    if not any(sizes):
        raise NotPlanned(
            'bucket sizes "auto" in zero_optimization are made from a hidden size, which the '
            "model's configuration does not name; say numbers"
        )
    return int(sizes[0] or max(sizes))


def planned_settings(settings: Mapping[str, Any]) -> Settings:
    """What a plan needs of DeepSpeed's settings.

    Raises:
        NotPlanned: Where one changes what is held and is not planned; names it.
    """
    zero = settings["zero_optimization"]
    states, weights = zero.get("offload_optimizer") or {}, zero.get("offload_param") or {}
    disk = disk_of(settings)
    read = _SAME_BYTES | _READ | (_READ_AT_3 if zero["stage"] == 3 else frozenset())
    if not disk.states:
        read |= _OF_STATES_ON_DISK
    for key, value in _given(settings):
        if key in read:
            continue
        if key not in _PLANNED_AT or value != _PLANNED_AT[key]:
            raise NotPlanned(_not_known(key, value))
    overlap = bool(zero.get("overlap_comm"))
    if overlap and zero["stage"] == 1:
        raise NotPlanned(_not_known("zero_optimization.overlap_comm", True) + " at stage 1")
    return Settings(
        stage=zero["stage"],
        offload=states.get("device", "none") != "none",
        pinned=bool(states.get("pin_memory", True)),
        overlap=overlap,
        bucket=zero.get("reduce_bucket_size", _BUCKET_ELEMENTS),
        offload_parameters=weights.get("device", "none") != "none",
        pinned_parameters=bool(weights.get("pin_memory", True)),
        divided={key: zero.get(key, usual) for key, usual in _STAGE_3.items()},
        disk=disk,
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
