"""What torch takes of the host for pinned memory, replayed."""

from __future__ import annotations

import torch

from lowres.core import host
from lowres.memory.host_allocator import given_bytes
from lowres.memory.tracer import Tracer


def given(device: str) -> list[int]:
    """After each event of a few tensors that wait on the host beside such a device."""
    tracer = Tracer()
    with host.planning(device), tracer:
        here = torch.zeros(1000)
        first, second = host.copy(here), host.copy(here)
        del first
        third = host.copy(here[:900])
        small = host.copy(here[:500])
        with host.memory():
            pageable = host.mark(torch.empty(1000))
        tracer.mark("end")
    out = given_bytes(tracer.trace.apart()[1])
    del second, third, small, pageable
    return out


def test_pinned_memory_comes_in_powers_of_two_and_is_kept_for_the_next() -> None:
    """Closed form: 4,000 bytes take 4,096; 3,600 take what the first gave back; 2,000 take 2,048;
    pageable memory takes what is asked for."""
    assert given("cuda") == [0, 4096, 8192, 8192, 8192, 10240, 14240]


def test_beside_a_cpu_nothing_is_pinned() -> None:
    """Closed form: the bytes that tensors ask for, less those that are let go."""
    assert given("cpu") == [0, 4000, 8000, 4000, 7600, 9600, 13600]
