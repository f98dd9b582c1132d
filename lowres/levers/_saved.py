"""What autograd saves, kept in host memory until the backward pass asks for it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from typing import Any

import torch

from lowres.core import host


class Saved:
    """Hooks for the saved tensors of one forward pass.

    What several operations save is kept once, and once it has come back it stays on the device
    until the last of them has used it, as it would without the hooks. What was saved before it is
    fetched at the same time, so that on CUDA its copy runs beside the computation.

    Args:
        fixed: Tensors that never move, nor do views of them: parameters and buffers.
        device: Of the computation; what is elsewhere stays there.
        smallest_bytes: Smaller tensors stay.
        stream: Of the copies on CUDA; None on a CPU, where a copy is done when it returns.
    """

    def __init__(
        self,
        fixed: Iterable[torch.Tensor],
        device: torch.device,
        smallest_bytes: int,
        stream: torch.cuda.Stream | None,
    ) -> None:
        storages = [tensor.untyped_storage() for tensor in fixed]
        # Where a storage has died another may begin at its address.
        self._fixed = {storage._cdata: weakref.ref(storage) for storage in storages}
        self._device, self._smallest_bytes, self._stream = device, smallest_bytes, stream
        self._known: dict[Any, weakref.ref[Kept]] = {}
        self._latest: weakref.ref[Kept] | None = None

    def pack(self, tensor: torch.Tensor) -> Any:
        """A tensor's `Ticket`, or itself where it stays."""
        storage = tensor.untyped_storage()
        if (
            tensor.device != self._device
            or not tensor.is_floating_point()
            or tensor.numel() * tensor.element_size() < self._smallest_bytes
            or self._is_fixed(storage)
            or host.holds(tensor)
        ):
            return tensor
        size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset()
        # A view of most of its storage is kept with the whole of it, for the sake of other views.
        whole = storage.nbytes() <= tensor.numel() * tensor.element_size()
        key: Any = (storage._cdata, tensor._version, tensor.dtype)
        key = key if whole else (*key, size, stride, offset)
        found = self._known.get(key)
        kept = found() if found is not None else None
        if kept is None or kept.source() is None:
            with torch.no_grad():
                plain = tensor.detach()
                if whole:
                    count = storage.nbytes() // tensor.element_size()
                    plain = plain.as_strided((count,), (1,), 0)
                kept = Kept(plain, self._stream, self._latest)
            self._known[key] = self._latest = weakref.ref(kept)
        return Ticket(kept, (size, stride, offset) if whole else None)

    def _is_fixed(self, storage: torch.UntypedStorage) -> bool:
        there = self._fixed.get(storage._cdata)
        return there is not None and there() is not None

    def unpack(self, packed: Any) -> torch.Tensor:
        """The tensor again, on the device."""
        return packed.redeem() if isinstance(packed, Ticket) else packed


class Kept:
    """One tensor in host memory.

    Args:
        tensor: On the device, without a graph.
        before: What was kept before it, and so is wanted after it.
    """

    def __init__(
        self,
        tensor: torch.Tensor,
        stream: torch.cuda.Stream | None,
        before: weakref.ref[Kept] | None,
    ) -> None:
        self.source = weakref.ref(tensor.untyped_storage())
        self.before, self.waiting = before, 0
        self._device, self._stream = tensor.device, stream
        self._here: torch.Tensor | None = None
        self._arrived: Any = None
        with self._beside():
            self._there = host.copy(tensor, non_blocking=stream is not None)
        if stream is not None:
            # The allocator must not give the memory away while it is read.
            tensor.record_stream(stream)

    def _beside(self) -> contextlib.AbstractContextManager[Any]:
        """On the copying stream, behind what the computation has queued so far."""
        if self._stream is None:
            return contextlib.nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)

    def fetch(self) -> None:
        """Begin to bring it back, where that was not begun."""
        if self._here is not None:
            return
        # Allocated on the stream of the computation, where it is used and let go.
        here = torch.empty_like(self._there, device=self._device)
        with self._beside():
            here.copy_(self._there, non_blocking=self._stream is not None)
            if self._stream is not None:
                self._arrived = self._stream.record_event()
        if self._stream is not None:
            here.record_stream(self._stream)
        self._here = here

    def get(self) -> torch.Tensor:
        """The tensor on the device; what the computation queues from now on may use it."""
        self.fetch()
        assert self._here is not None
        if self._arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived)
        before = self.before() if self.before is not None else None
        if before is not None and before.waiting:
            before.fetch()
        return self._here

    def leave(self) -> None:
        """One who waited has it, or will never want it."""
        self.waiting -= 1
        if not self.waiting:
            self._here = self._arrived = None


class Ticket:
    """What autograd holds in a saved tensor's place.

    Args:
        view: Size, stride and offset in the kept storage; None where the tensor itself is kept.
    """

    def __init__(self, kept: Kept, view: Any) -> None:
        self._kept, self._view, self._open = kept, view, True
        kept.waiting += 1

    def redeem(self) -> torch.Tensor:
        with torch.no_grad():
            tensor = self._kept.get()
            if self._view is not None:
                tensor = tensor.as_strided(*self._view)
        self._close()
        return tensor

    def _close(self) -> None:
        if self._open:
            self._open = False
            self._kept.leave()

    def __del__(self) -> None:
        self._close()
