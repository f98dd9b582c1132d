"""Tensors that wait in host memory while the model is on a device.

Levers that move bytes off the device allocate through here, so that what counts bytes can tell the
two apart also where the device is the CPU and both are one memory.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Memory = Literal["pageable", "pinned", "mapped"]
"""Pinned is page-locked: copies to and from it need not wait for the host. Mapped is a file's, of
which the host holds what its system caches."""


class _Here(threading.local):
    memory: Memory | None = None


_here = _Here()
_marked: dict[int, tuple[Memory, Any]] = {}
_planned: contextvars.ContextVar[str | None] = contextvars.ContextVar("planned", default=None)


@contextlib.contextmanager
def planning(device: str) -> Iterator[None]:
    """A plan is made while the block runs: tensors of such a device are fake ones of the CPU."""
    token = _planned.set(device)
    try:
        yield
    finally:
        _planned.reset(token)


def planned() -> bool:
    """Whether a plan is made, and nothing is to be written."""
    return _planned.get() is not None


def pins(device: torch.device) -> bool:
    """Whether host memory beside a device is pinned: CUDA's is."""
    return (_planned.get() or device.type) == "cuda"


@contextlib.contextmanager
def memory(kind: Memory = "pageable") -> Iterator[None]:
    """What the block allocates lies in host memory. `mark` what outlives it."""
    before, _here.memory = _here.memory, kind
    try:
        yield
    finally:
        _here.memory = before


def allocating() -> bool:
    """Whether this thread is inside of `memory()`."""
    return _here.memory is not None


def mark(tensor: torch.Tensor, kind: Memory = "pageable") -> torch.Tensor:
    """Say that a tensor's storage is host memory, for as long as it lives. Returns the tensor."""
    storage = tensor.untyped_storage()
    key = storage._cdata
    if key in _marked:
        _marked[key] = (kind, _marked[key][1])
    else:
        _marked[key] = (kind, weakref.finalize(storage, _marked.pop, key, None))
    return tensor


def holds(tensor: torch.Tensor) -> bool:
    """Whether a tensor was marked."""
    return tensor.untyped_storage()._cdata in _marked


def kind_of(tensor: torch.Tensor) -> Memory | None:
    """As what a tensor was marked, else what this thread allocates; None is the device's memory."""
    marked = _marked.get(tensor.untyped_storage()._cdata)
    return _here.memory if marked is None else marked[0]


def empty(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host memory for tensors of a device, (elements,); pinned where that is CUDA."""
    import torch

    kind: Memory = "pinned" if pins(device) else "pageable"
    with memory(kind):
        pinned = device.type == "cuda"
        return mark(torch.empty(elements, dtype=dtype, pin_memory=pinned), kind)


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """Host memory for a tensor of that shape and type; pinned where there is a CUDA device."""
    import torch

    kind: Memory = "pinned" if pins(tensor.device) else "pageable"
    with memory(kind):
        pinned = tensor.device.type == "cuda"
        return mark(torch.empty_like(tensor, device="cpu", pin_memory=pinned), kind)


def copy(tensor: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """A copy of a tensor, (its shape), in host memory.

    Args:
        non_blocking: On CUDA the copy is only queued on the current stream.
    """
    out = empty_like(tensor)
    return out.copy_(tensor, non_blocking=non_blocking)
