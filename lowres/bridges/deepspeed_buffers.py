"""What of DeepSpeed's settings tells of a disk and of the page-locked buffers between it and the
host's memory.

Source: deepspeed 0.19, runtime/swap_tensor/partitioned_param_swapper.py and optimizer_utils.py,
runtime/zero/offload_config.py; csrc/pin_memory/page_alloc.cpp: unlike torch's they are not rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowres.core.errors import InputError, Problem

if TYPE_CHECKING:
    import torch

SECTOR_BYTES = 512  # Files are read directly, into memory that begins at a multiple of it.
_LEAST_BYTES = 1024**2
_ALIGNED_BYTES = 1024
_BUFFERS, STATE_BUFFERS = 5, 4
_BUFFER_ELEMENTS = 100_000_000
_IN_MEMORY_ELEMENTS = 1_000_000_000


@dataclass(frozen=True)
class Disk:
    """What lies on a disk, and what is kept in memory for it.

    Args:
        states: Optimizer states and float32 copies lie there.
        weights: Parameters do.
        least_bytes: A tensor that is smaller waits in host memory.
        aligned_bytes: Files are read and written in multiples of it.
        state_buffers: Each holds one tensor of the largest sub-group.
        weight_buffers: Each holds `weight_elements` of one parameter.
        in_memory_elements: Of trained parameters that wait in host memory after all.
    """

    states: bool = False
    weights: bool = False
    least_bytes: int = _LEAST_BYTES
    aligned_bytes: int = _ALIGNED_BYTES
    state_buffers: int = STATE_BUFFERS
    weight_buffers: int = _BUFFERS
    weight_elements: int = _BUFFER_ELEMENTS
    in_memory_elements: int = _IN_MEMORY_ELEMENTS

    def takes(self, elements: int, dtype: torch.dtype) -> bool:
        """Whether a tensor is large enough to lie on the disk."""
        return elements * dtype.itemsize >= self.least_bytes

    def aligned(self, elements: int, dtype: torch.dtype) -> int:
        """Elements that are read and written for so many."""
        step = self.aligned_bytes // dtype.itemsize
        return -(-elements // step) * step


def disk_of(settings: Mapping[str, Any]) -> Disk:
    """What DeepSpeed's settings say of a disk."""
    zero, aio = settings["zero_optimization"], settings.get("aio") or {}
    states, weights = zero.get("offload_optimizer") or {}, zero.get("offload_param") or {}
    return Disk(
        states=states.get("device") == "nvme",
        weights=weights.get("device") == "nvme",
        least_bytes=max(_LEAST_BYTES, int(aio.get("block_size", _LEAST_BYTES))),
        aligned_bytes=_ALIGNED_BYTES * int(aio.get("intra_op_parallelism", 1)),
        state_buffers=int(states.get("buffer_count", STATE_BUFFERS)),
        weight_buffers=int(weights.get("buffer_count", _BUFFERS)),
        weight_elements=int(weights.get("buffer_size", _BUFFER_ELEMENTS)),
        in_memory_elements=int(weights.get("max_in_cpu", _IN_MEMORY_ELEMENTS)),
    )


def few_buffers(count: int, needed: int) -> str:
    """What to say where parameters are wanted together that have no buffers."""
    return (
        f"offload_param.buffer_count is {count}, and {needed} parameters on nvme are needed "
        f"together; say {needed} at least, or keep fewer of them whole: "
        "stage3_max_reuse_distance 0, stage3_prefetch_bucket_size 0"
    )


def refusal(text: str) -> InputError:
    """Of the lever."""
    return InputError("the recipe", [Problem("levers", f"'zero': {text}")])
