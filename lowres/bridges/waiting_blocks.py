"""Blocks whose frozen tensors wait in host memory or in files, the next ones on their way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowres.core import host
from lowres.core.disk import MappedFile


@dataclass
class Slot:
    """One frozen tensor: an attribute that points to its copy on the device while that is used."""

    owner: Any
    attribute: str
    host: torch.Tensor
    device: torch.Tensor | None = None

    def point(self, to: torch.Tensor) -> None:
        setattr(self.owner, self.attribute, to)


class Streamed:
    """The blocks of one model, of which at most `resident` are on the device.

    While a block is at work the next one in its direction is copied: upwards in the forward pass,
    downwards in the backward pass and when blocks are recomputed.
    """

    def __init__(self, blocks: list[list[Slot]], resident: int) -> None:
        self.blocks, self.resident = blocks, resident
        self._device = torch.device("cpu")
        self._at, self._direction = -1, 1
        self._there: dict[int, Any] = {}
        """Block to the event that ends its copy; None where there is nothing to wait for."""
        self._slots: dict[int, tuple[int, int]] = {}
        """Storage of a copy on the device to its block and slot."""
        self._stream: Any = None
        self._files: list[MappedFile] = []
        self._staging: torch.Tensor | None = None
        self._sent: Any = None
        """The event after which the staging memory may be written again."""

    @property
    def size_bytes(self) -> int:
        """Of all that waits."""
        return sum(slot.host.nbytes for block in self.blocks for slot in block)

    def to_disk(self, folder: Path | None) -> None:
        """Let the blocks wait in files instead, one a block; None, in a plan, writes none."""
        for block in self.blocks:
            self._files.append(MappedFile([slot.host for slot in block], folder))
            for slot, there in zip(block, self._files[-1].tensors, strict=True):
                slot.host = there
                slot.point(there)

    def tensors(self) -> Iterator[torch.Tensor]:
        """What is alive: the host's tensors and the copies of them."""
        for slot in (slot for block in self.blocks for slot in block):
            yield slot.host
            if slot.device is not None:
                yield slot.device

    def use(self, block: int, device: torch.device | None = None) -> None:
        """Have a block on the device, and the next one on its way."""
        self._device = device or self._device
        if block == self._at:
            return
        if self._at >= 0:
            self._direction = 1 if block > self._at else -1
        # Until all is there nothing is: running out of memory meanwhile begins again.
        self._at = -1
        wanted = self._neighbours(block)
        for other in [b for b in self._there if b not in wanted]:
            self._drop(other)
        for other in wanted:
            if other not in self._there:
                self._fetch(other)
        self._wait(block)
        for slot in self.blocks[block]:
            assert slot.device is not None
            slot.point(slot.device)
        self._at = block

    def pack(self, tensor: torch.Tensor) -> tuple[Any, ...] | None:
        """Where a tensor that autograd saves lies, if it lies in a copy: kept in its place."""
        if tensor.layout is not torch.strided:
            return None
        found = self._slots.get(tensor.untyped_storage()._cdata)
        if found is None:
            return None
        return (*found, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(self, place: tuple[Any, ...]) -> torch.Tensor:
        block, number, dtype, shape, stride, offset = place
        self.use(block)
        copy = self.blocks[block][number].device
        assert copy is not None and copy.dtype == dtype
        return copy.as_strided(shape, stride, offset)

    def _neighbours(self, block: int) -> list[int]:
        """The block and those that come next; behind it where there are none before it."""
        count = len(self.blocks)
        ahead = range(block + self._direction, count if self._direction > 0 else -1,
                      self._direction)  # fmt: skip
        behind = range(block - self._direction, -1 if self._direction > 0 else count,
                       -self._direction)  # fmt: skip
        return [block, *ahead, *behind][: self.resident]

    @torch.no_grad()
    def _fetch(self, block: int) -> None:
        event, cuda = None, self._device.type == "cuda"
        for slot in self.blocks[block]:
            if cuda and not self._files and not slot.host.is_pinned():
                slot.host = slot.host.pin_memory()
                slot.point(slot.host)
            # Taken on the stream that computes, which alone uses the memory before and after.
            slot.device = torch.empty_like(slot.host, device=self._device)
        sources = self._sources(block)
        if cuda:
            computing = torch.cuda.current_stream(self._device)
            self._stream = self._stream or torch.cuda.Stream(self._device)
            self._stream.wait_stream(computing)
            with torch.cuda.stream(self._stream):
                self._copy(block, sources)
                self._sent = event = torch.cuda.Event()
                event.record(self._stream)
        else:
            self._copy(block, sources)
        if self._files:
            self._files[block].let_go()
        self._there[block] = event

    def _sources(self, block: int) -> list[torch.Tensor]:
        """What is copied: of a file its bytes in pinned memory, where the copy is to be queued."""
        if not self._files or not host.pins(self._device):
            return [slot.host for slot in self.blocks[block]]
        if self._staging is None:
            largest = max(file.size_bytes for file in self._files)
            self._staging = host.empty(largest, torch.uint8, self._device)
        if self._sent is not None:
            self._sent.synchronize()
        return self._files[block].staged(self._staging)

    def _copy(self, block: int, sources: list[torch.Tensor]) -> None:
        for number, (slot, source) in enumerate(zip(self.blocks[block], sources, strict=True)):
            assert slot.device is not None
            slot.device.copy_(source, non_blocking=True)
            self._slots[slot.device.untyped_storage()._cdata] = (block, number)

    def _wait(self, block: int) -> None:
        if self._there[block] is not None:
            torch.cuda.current_stream(self._device).wait_event(self._there[block])
            self._there[block] = None

    def _drop(self, block: int) -> None:
        # A copy under way must not write into memory that is somebody else's by then.
        self._wait(block)
        del self._there[block]
        for slot in self.blocks[block]:
            assert slot.device is not None
            del self._slots[slot.device.untyped_storage()._cdata]
            slot.point(slot.host)
            slot.device = None
