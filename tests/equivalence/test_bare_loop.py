"""Memory of lowres's update beside a loop written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers.trainer import Bare, Lowres, peak_live_bytes


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_peak_of_live_bytes_is_that_of_the_bare_loop(
    method: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Reference: the bare loop over the same model and rows, within 1 %."""
    one = recipe(
        "encoder", method=method, loop={"micro_batch_size": 8, "global_batch_size": 16, "steps": 9}
    )
    (tmp_path / "out").mkdir()
    bare, ours = Bare(one), Lowres(one, tmp_path / "out")
    rows = bare.built.train_rows[:16]
    for _ in range(2):
        bare.update(rows)
        ours.update(rows)
    peaks = [peak_live_bytes(c, rows) for c in (bare, ours)]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)
    assert torch.get_num_threads() == 2
