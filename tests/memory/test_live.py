"""Counting live bytes."""

from __future__ import annotations

import pytest
import torch

from lowres.memory.live import LiveBytes, tensors_of
from lowres.memory.meter import Meter

KIB = 1024


def floats(kib: int) -> torch.Tensor:
    return torch.ones(kib * KIB // 4)


def test_the_peak_of_known_allocations() -> None:
    """Closed form: 8 + 4 alive, 8 dies, 2 more: peak 12, now 6 KiB."""
    with LiveBytes("cpu") as counted:
        a = floats(8)
        b = floats(4)
        del a
        c = floats(2)
        assert counted.now_bytes == 6 * KIB
    assert counted.peak_bytes == 12 * KIB
    del b, c


def test_views_count_once_and_the_last_one_keeps_the_storage() -> None:
    """Closed form."""
    with LiveBytes("cpu") as counted:
        base = floats(8)
        view = base.view(2, -1)[0]
        del base
        assert counted.now_bytes == 8 * KIB
        del view
        assert counted.now_bytes == 0


def test_what_is_held_before_counts_and_its_death_is_seen() -> None:
    """Closed form: an optimizer's states, parameters and gradients are there from the start."""
    module = torch.nn.Linear(16, 16, bias=False)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    one = 16 * 16 * 4
    with LiveBytes("cpu", tensors_of(module, optimizer)) as counted:
        # weight, gradient, two moments and the step counter of 4 bytes
        assert counted.now_bytes == 4 * one + 4
        optimizer.zero_grad(set_to_none=True)
        assert counted.now_bytes == 3 * one + 4


def test_a_forward_and_backward_pass_equals_torchs_own_profiler() -> None:
    """Reference: allocations and frees that torch's profiler records for the same pass."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8))
    data = torch.randn(32, 64)

    def step() -> None:
        model(data).square().mean().backward()

    step()  # the gradients exist from here on, so both passes do the same
    with LiveBytes("cpu", [*tensors_of(model), data]) as counted:
        before = counted.now_bytes
        step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    # The profiler also sees blocks of a few bytes that no tensor returned by an operation holds.
    assert counted.peak_bytes - before == pytest.approx(peak, rel=0.01)


def test_phases_entered_twice_keep_the_larger_peak_and_add_up_time() -> None:
    """Closed form."""
    meter = Meter(torch.device("cpu"))
    for kib in (16, 4):
        with meter.phase("evaluate", lambda: ()):
            kept = floats(kib)
            del kept
    first = meter.phases["evaluate"]
    assert first.live_bytes == 16 * KIB
    assert first.seconds is not None and first.seconds > 0
    assert first.allocated_bytes is None, "there is no CUDA allocator here"


def test_resident_memory_is_measured_over_its_value_before() -> None:
    """Behaviour: 64 MiB that are touched show, within what the process does besides."""
    meter = Meter(torch.device("cpu"))
    with meter.phase("load"):
        kept = torch.ones(64 << 20, dtype=torch.uint8)
    found = meter.phases["load"].resident_bytes
    assert found is not None and 60 << 20 < found < 256 << 20
    del kept
