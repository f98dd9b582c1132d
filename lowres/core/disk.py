"""Tensors that wait in files, mapped into memory: of them the host holds what its system caches.

A file has no name. So none is found half-written, none is left behind by a run that died, and the
disk has its room back when nothing uses the tensors any more, however the process ended.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowres.core import host
from lowres.core.errors import LowresError
from lowres.core.units import format_bytes

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 64
"""Bytes; no type is wider, and a cache line is as wide."""


def try_folder(folder: Path) -> None:
    """Make a folder where there is none, and a file in it. Raises OSError where that cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


class MappedFile:
    """Tensors over one file, which is written when this is made.

    Args:
        tensors: On the CPU; `self.tensors` are alike in shape, strides, type and values.
        folder: Where the file lies; None in a plan, which writes none.

    Raises:
        LowresError: When it cannot be written.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], folder: Path | None) -> None:
        self._begins: list[int] = []
        end = 0
        for tensor in tensors:
            self._begins.append(-(-end // _ALIGNMENT) * _ALIGNMENT)
            end = self._begins[-1] + tensor.nbytes
        self.size_bytes = end
        self._mapped: mmap.mmap | None = None
        if folder is None:
            self.tensors = [host.mark(tensor, "mapped") for tensor in tensors]
        else:
            self._mapped = self._written(tensors, folder)
            self.tensors = [self._over(t, at) for t, at in zip(tensors, self._begins, strict=True)]

    def staged(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Copies of the tensors in host memory of their bytes, (`size_bytes` or more,) in uint8."""
        import torch

        if self._mapped is None:
            return self.tensors
        buffer[: self.size_bytes].copy_(torch.frombuffer(self._mapped, dtype=torch.uint8))
        return [
            buffer[at : at + t.nbytes].view(t.dtype).as_strided(t.shape, t.stride())
            for t, at in zip(self.tensors, self._begins, strict=True)
        ]

    def let_go(self) -> None:
        """Forget pages that were read: they would count as resident memory, which a budget limits.
        The system's cache still has them."""
        if self._mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)

    def _written(self, tensors: Sequence[torch.Tensor], folder: Path) -> mmap.mmap:
        import torch

        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                for tensor, at in zip(tensors, self._begins, strict=True):
                    with host.memory():
                        flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
                        flat.as_strided(tensor.shape, _strides(tensor)).copy_(tensor)
                    file.seek(at)
                    file.write(flat.view(torch.uint8).numpy().data)
                file.flush()
                # A page that is not on the disk could not be let go, nor an error be told later.
                os.fsync(file.fileno())
                return mmap.mmap(file.fileno(), self.size_bytes, access=mmap.ACCESS_COPY)
        except OSError as error:
            free = shutil.disk_usage(folder).free
            why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise LowresError(
                f"{format_bytes(self.size_bytes)} of weights could not be written to {folder}: "
                f"{why} ({format_bytes(free)} free); make room there, or name another folder"
            ) from error

    def _over(self, tensor: torch.Tensor, at: int) -> torch.Tensor:
        import torch

        # Each has a storage of its own, so that what counts and saves storages sees them apart.
        flat = torch.frombuffer(self._mapped, dtype=tensor.dtype, count=tensor.numel(), offset=at)
        return host.mark(flat, "mapped").as_strided(tensor.shape, _strides(tensor))


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Of a tensor without gaps that is otherwise laid out as this one."""
    import torch

    return torch.empty_like(tensor, device="meta").stride()
