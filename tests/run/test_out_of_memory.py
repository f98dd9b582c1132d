"""Memory of a card that is capped, runs out or is asked for, as far as can be told without one."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowres.core.units import GIB
from lowres.memory import device as devices
from lowres.memory.meter import process_bytes
from lowres.run.execute import _limit
from lowres.run.out_of_memory import is_out_of_memory


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (2)"), False),
    ],
)
def test_it_is_told_from_other_errors(error: BaseException, is_it: bool) -> None:
    """Reference: what torch says where its own allocator, page-locked memory, cuBLAS and the host
    have none left."""
    assert is_out_of_memory(error) == is_it


@pytest.mark.parametrize("budget", [None, 6.0])
def test_the_allocator_gets_what_a_plan_has_for_tensors(
    budget: float | None, recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the plan's card of that budget, whose context is no tensors'."""
    card = devices.load("rtx-3090")
    told: list[tuple[float, int]] = []
    monkeypatch.setattr(devices, "of_torch", lambda device: card)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: SimpleNamespace(total_memory=card.total_bytes),
    )
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *of: told.append(of))
    accelerator = SimpleNamespace(device=torch.device("cuda", 0))
    _limit(recipe("encoder", budget={"device_gib": budget}), accelerator, SimpleNamespace())
    ((share, index),) = told
    most = card.total_bytes if budget is None else budget * GIB - card.context_bytes
    assert index == 0 and share * card.total_bytes == pytest.approx(most)
    assert card.context_bytes > 0


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ([(os.getpid(), 5), (1, 7)], 5),
        ([(1, 7)], 7),  # in a container, under the number that it has outside
        ([(1, 7), (2, 8)], None),
        ([(os.getpid(), None)], None),
        ([], None),
    ],
)
def test_what_the_driver_charges_is_that_of_this_process(
    there: list[tuple[int, int | None]], told: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: by its number, or where there is no other."""
    import pynvml

    listed = [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in there]
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda handle: listed)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0")
    )
    assert process_bytes(torch.device("cuda", 0)) == told
