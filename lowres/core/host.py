"""Tensors that wait in host memory while the model is on a device.

Levers that move bytes off the device allocate through here, so that what counts bytes can tell the
two apart also where the device is the CPU and both are one memory.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class _Here(threading.local):
    depth = 0


_here = _Here()
_marked: dict[int, Any] = {}


@contextlib.contextmanager
def memory() -> Iterator[None]:
    """What the block allocates lies in host memory. `mark` what outlives it."""
    _here.depth += 1
    try:
        yield
    finally:
        _here.depth -= 1


def allocating() -> bool:
    """Whether this thread is inside of `memory()`."""
    return _here.depth > 0


def mark(tensor: torch.Tensor) -> torch.Tensor:
    """Say that a tensor's storage is host memory, for as long as it lives. Returns the tensor."""
    storage = tensor.untyped_storage()
    key = storage._cdata
    if key not in _marked:
        _marked[key] = weakref.finalize(storage, _marked.pop, key, None)
    return tensor


def holds(tensor: torch.Tensor) -> bool:
    """Whether a tensor was marked."""
    return tensor.untyped_storage()._cdata in _marked


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """Host memory for a tensor of that shape and type; page-locked where there is a CUDA device."""
    import torch

    pinned = tensor.device.type == "cuda"
    with memory():
        return mark(torch.empty_like(tensor, device="cpu", pin_memory=pinned))


def copy(tensor: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """A copy of a tensor, (its shape), in host memory.

    Args:
        non_blocking: On CUDA the copy is only queued on the current stream.
    """
    out = empty_like(tensor)
    return out.copy_(tensor, non_blocking=non_blocking)
