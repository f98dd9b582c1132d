"""Running out of memory, as the libraries say it."""

from __future__ import annotations

import torch

_TOLD = (
    "DefaultCPUAllocator: can't allocate",
    # Of page-locked memory, and of what libraries take of the card beside torch.
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's or the host's memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or any(m in str(error) for m in _TOLD)
