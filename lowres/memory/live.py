"""Bytes held by live tensors, counted by storage while a block of code runs.

A dispatch mode sees every tensor that an operation returns; a storage counts from the first time it
is seen until the last tensor over it dies. Bytes are what the storage asks for, without the
allocator's rounding, so the figure is exact and the same on every run. What levers keep in host
memory (`core.host`) is counted apart, and what waits in files is not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowres.core import host


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count live bytes on one device type.

    Args:
        device_type: Storages elsewhere are not counted.
        held: Tensors that are alive already (parameters, buffers, gradients, optimizer states).
    """

    def __init__(self, device_type: str, held: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.now_bytes = 0
        self.peak_bytes = 0
        self.host_bytes = 0
        self.host_peak_bytes = 0
        self._seen: dict[int, weakref.finalize[Any, Any]] = {}
        for tensor in held:
            self._note(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        return out

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)  # type: ignore[no-untyped-call]
        for watch in self._seen.values():
            watch.detach()
        self._seen.clear()

    def _note(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self.device_type or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size_bytes = storage.nbytes()
        kind = host.kind_of(tensor)
        if kind == "mapped":
            return
        on_host = kind is not None
        self._seen[key] = weakref.finalize(storage, self._gone, key, size_bytes, on_host)
        if on_host:
            self.host_bytes += size_bytes
            self.host_peak_bytes = max(self.host_peak_bytes, self.host_bytes)
            return
        self.now_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def _gone(self, key: int, size_bytes: int, on_host: bool) -> None:
        if self._seen.pop(key, None) is None:
            return
        if on_host:
            self.host_bytes -= size_bytes
        else:
            self.now_bytes -= size_bytes


def tensors_of(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> Iterable[torch.Tensor]:
    """Parameters, their gradients, buffers and optimizer states."""
    for parameter in module.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from module.buffers()
    if optimizer is not None:
        for state in optimizer.state.values():
            yield from (v for v in state.values() if isinstance(v, torch.Tensor))
