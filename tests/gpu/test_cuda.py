"""The run on a CUDA device: meters, cap, recovery, precision. Run with `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowres
from lowres.core.errors import OutOfMemory
from lowres.core.units import GIB
from lowres.memory.device import of_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_is_measured_in_every_phase(
    precision: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: the four meters of each phase, in order of size."""
    one = recipe("encoder", method="lora", loop={"precision": precision})
    record = lowres.run(one, output_folder=tmp_path / "out", quiet=True)
    assert record.outcome == "ok" and record.measured.allocator_retries == 0
    for name, m in record.measured.phases.items():
        assert m.live_bytes and m.allocated_bytes and m.reserved_bytes, name
        assert m.live_bytes <= m.allocated_bytes <= m.reserved_bytes, name
        if m.process_bytes is not None:
            assert m.process_bytes >= m.allocated_bytes, name


def test_the_budget_caps_the_allocator_and_running_out_recovers(
    recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: a micro-batch that does not fit is halved until it does, or the run says so."""
    keys = {"micro_batch_size": 32, "global_batch_size": 32, "max_length": 64}
    context = of_torch(torch.device("cuda", torch.cuda.current_device())).context_bytes
    small = recipe("encoder", loop=keys, budget={"device_gib": context / GIB + 0.03})
    try:
        record = lowres.run(small, output_folder=tmp_path / "out", quiet=True, plan=False)
    except OutOfMemory as error:
        assert "out of memory" in str(error)
        return
    assert any(e.kind == "out_of_memory" for e in record.events)
    free = recipe("encoder", loop=keys)
    reference = lowres.run(free, output_folder=tmp_path / "free", quiet=True)
    assert record.losses == pytest.approx(reference.losses, rel=1e-4)
