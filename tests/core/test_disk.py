"""Tensors over files without a name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from lowres.core import host
from lowres.core.disk import MappedFile
from lowres.core.errors import LowresError
from lowres.memory.live import LiveBytes

MAPS = Path("/proc/self/maps")


def tensors() -> list[torch.Tensor]:
    """Of the types that layers hold: a matrix laid out by columns, packed bytes, one number."""
    numbers = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, 5, generator=numbers).to(torch.bfloat16),
        torch.randn(4, 6, generator=numbers).t(),
        torch.randint(0, 256, (7, 1), generator=numbers, dtype=torch.uint8),
        torch.tensor(0.25),
    ]


def file_of(tensor: torch.Tensor) -> str:
    """The file that a tensor's memory is mapped from; empty where it is none."""
    for line in MAPS.read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return " ".join(line.split()[5:])
    raise AssertionError("it lies nowhere")


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    """Reference: the tensors themselves, bit for bit, in their shapes, strides and types; from the
    file, once more when its pages were let go, and through a staging buffer."""
    file = MappedFile(tensors(), tmp_path)
    for _ in range(2):
        for found in (file.tensors, file.staged(torch.empty(999, dtype=torch.uint8))):
            for one, other in zip(found, tensors(), strict=True):
                assert one.dtype == other.dtype and one.stride() == other.stride()
                assert torch.equal(one, other)
        file.let_go()


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not tell what is mapped")
def test_they_are_mapped_from_a_file_without_a_name(tmp_path: Path) -> None:
    """Behaviour: as the system tells it; each has a storage of its own, of its own size."""
    there = tensors()
    file = MappedFile(there, tmp_path)
    for one, other in zip(file.tensors, there, strict=True):
        assert str(tmp_path) in file_of(one) and str(tmp_path) not in file_of(other)
        assert one.untyped_storage().nbytes() == other.nbytes
    assert not list(tmp_path.iterdir())


def test_what_is_mapped_takes_no_memory(tmp_path: Path) -> None:
    """Closed form: neither the device's nor the host's; a copy of it takes its bytes."""
    (one,) = MappedFile([torch.zeros(1024)], tmp_path).tensors
    with LiveBytes("cpu", [one]) as counted:
        assert host.holds(one) and (counted.now_bytes, counted.host_bytes) == (0, 0)
        copied = one.clone()
        assert (counted.now_bytes, counted.host_bytes) == (4096, 0)
        del copied


def test_a_full_disk_is_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: the system's error becomes one that says what to do."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LowresError, match=r"260 B of weights .* the disk is full .* make room"):
        MappedFile(tensors(), tmp_path)
    assert not list(tmp_path.iterdir())
