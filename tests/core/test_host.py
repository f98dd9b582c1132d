"""Host memory that levers use: counted apart, by what measures and by what plans."""

from __future__ import annotations

import torch

from lowres.core import host
from lowres.memory.live import LiveBytes
from lowres.memory.tracer import Tracer


def test_what_waits_on_the_host_is_counted_apart() -> None:
    """Closed form: 4 KiB on the device, a copy of it on the host, and its view is no new memory."""
    with LiveBytes("cpu") as counted:
        here = torch.zeros(1024)
        there = host.copy(here)
        view = there.view(2, 512)
        assert (counted.now_bytes, counted.host_bytes) == (4096, 4096)
        del here
        assert (counted.now_bytes, counted.host_bytes) == (0, 4096)
        assert host.holds(view)
        del there, view
        assert counted.host_bytes == 0
    with LiveBytes("cpu", [host.copy(torch.zeros(1024))]) as counted:
        assert (counted.now_bytes, counted.host_peak_bytes) == (0, 4096)


def test_a_trace_tells_host_from_device() -> None:
    """Closed form: the same in a trace, told apart with its marks."""
    tracer = Tracer()
    with tracer:
        tracer.mark("one")
        here = torch.zeros(1024)
        tracer.mark("two")
        there = host.copy(here)
        del here
        tracer.mark("end")
        del there
    device, waiting = tracer.trace.apart()
    assert (device.peak_bytes(), waiting.peak_bytes()) == (4096, 4096)
    assert device.marks == [("one", 0), ("two", 1), ("end", 2)]
    assert waiting.marks == [("one", 0), ("two", 0), ("end", 1)]
