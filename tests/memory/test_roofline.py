"""Step times of traces with known work."""

from __future__ import annotations

import pytest
import torch

from lowres.memory.roofline import FILLING_SECONDS, Rates, step_time
from lowres.memory.trace import Cost, Trace

RATES = Rates(
    flops={"float32": 1e12, "float16": 4e12}, bandwidth=1e11, transfer=1e10, launch_seconds=2e-6,
    products=0.5, attention=0.25, traffic=0.8, band=(0.5, 2.0), basis="given",
)  # fmt: skip


def of(*costs: Cost) -> Trace:
    return Trace(costs=list(costs))


def test_a_product_takes_its_arithmetic_and_traffic_its_bytes() -> None:
    """Closed form, with four micro-batches of half the traced tokens: weights are read in each."""
    flops, weights, tokens_bytes = 10**12, 10**9, 4 * 10**10
    product = Cost(0, "forward", "products", torch.float32, flops, 10)
    copy = Cost(0, "forward", "traffic", torch.float32, 0, weights + tokens_bytes, weights)
    found = step_time(of(product, copy), RATES, passes=4.0, repeats=2.0, tokens=100.0)
    rate = 1e12 * 0.5
    assert found.parts["matrix products"] == pytest.approx(
        2 * flops / rate * (1 + 1e12 * FILLING_SECONDS / (flops / 2)), rel=1e-6
    )
    assert found.parts["memory traffic"] == pytest.approx(
        (4 * weights + 2 * tokens_bytes) / (1e11 * 0.8), rel=1e-6
    )
    assert found.tokens_per_second == pytest.approx(100.0 / found.seconds)
    assert (found.low_seconds, found.high_seconds) == (found.seconds / 2, found.seconds * 2)


def test_small_operations_wait_for_the_host_in_every_micro_batch() -> None:
    """Closed form: a launch costs what its work does not hide, in the optimizer step once."""
    small = Cost(0, "backward", "traffic", torch.float32, 0, 8)
    step = Cost(0, "optimizer step", "traffic", torch.float32, 0, 8)
    found = step_time(of(small, step), RATES, passes=16.0, repeats=16.0, tokens=1.0)
    work = 8 / (1e11 * 0.8)
    assert found.parts["launches"] == pytest.approx(17 * (2e-6 - work))


def test_float16_runs_at_its_own_rate() -> None:
    """Closed form: what was traced in bfloat16 for want of float16 is timed as float16."""
    cost = Cost(0, "forward", "products", torch.bfloat16, 10**13, 10)
    plain = step_time(of(cost), RATES, 1.0, 1.0, 1.0).seconds
    half = step_time(of(cost.in_float16()), RATES, 1.0, 1.0, 1.0).seconds
    assert plain / half == pytest.approx(4.0, rel=1e-3)
