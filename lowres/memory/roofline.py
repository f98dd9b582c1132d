"""Seconds of a step from its operations: each takes as long as its arithmetic or its traffic.

Source: Williams et al. 2009, Roofline: An Insightful Visual Performance Model,
https://doi.org/10.1145/1498765.1498785. The shares of a datasheet's rates that kernels reach are
assumptions until `lowres doctor --calibrate` has measured the device; the band says so.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lowres.core.plan import StepPlan
from lowres.memory.trace import Cost, Trace

FILLING_SECONDS = 1e-5
"""Matrix products shorter than this do not fill a device; they reach a share that grows with their
size.
"""


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Args:
        flops: By dtype name, such as `bfloat16`.
        bandwidth: Bytes of its own memory.
        transfer: Bytes between host and device, one way.
        launch_seconds: Of the host for one operation.
        products, attention, traffic: Shares of the above that kernels reach.
        band: Factors on the result between which a measured median is expected.
        basis: Where all this comes from.
        pages: Whether the device lacks the room for all that is paged. The driver lets go of what
            was used longest ago, so that of states, used in turns, none then stay.
    """

    flops: Mapping[str, float]
    bandwidth: float
    transfer: float
    launch_seconds: float
    products: float
    attention: float
    traffic: float
    band: tuple[float, float]
    basis: str
    pages: bool = True


DATASHEET = {"products": 0.7, "attention": 0.4, "traffic": 0.75, "band": (0.6, 1.7)}
"""Shares of datasheet rates; no record of a GPU stands behind them yet."""
MEASURED = {"products": 1.0, "attention": 0.6, "traffic": 1.0, "band": (0.75, 1.35)}
"""Shares of rates that a calibration measured with large products and copies."""


def paged_bytes(costs: Iterable[tuple[Cost, int]]) -> int:
    """Of all pages that costs, each with how often it occurs, move there and back."""
    moved = sum(cost.bytes * times for cost, times in costs if cost.kind == "paging")
    return moved // 2


def step_time(trace: Trace, rates: Rates, passes: float, repeats: float, tokens: float) -> StepPlan:
    """Time of one optimizer update.

    Args:
        trace: With the costs of the traced micro-batches and the optimizer step.
        passes: Micro-batches of an update over the traced ones: launches and weights read.
        repeats: Padded tokens of an update over those of the traced micro-batches.
        tokens: Real tokens of an update.
    """
    seconds: dict[str, float] = defaultdict(float)
    launches = 0.0
    # Blocks repeat: unlike costs are few.
    for (cost, stage), count in Counter((c.anywhere(), c.stage) for c in trace.costs).items():
        times = float(count)
        if stage in ("forward", "backward"):
            times, cost = count * passes, scaled(cost, repeats / passes)
        kind, work, idle = seconds_of(cost, rates)
        seconds[kind] += times * work
        launches += times * idle
    seconds["launches"] = launches
    total = sum(seconds.values())
    low, high = rates.band
    return StepPlan(
        seconds=total,
        low_seconds=total * low,
        high_seconds=total * high,
        tokens_per_second=tokens / total if total else 0.0,
        parts=dict(seconds),
        basis=rates.basis,
    )


def scaled(cost: Cost, grown: float, longer: float = 1.0) -> Cost:
    """A cost at other sizes.

    Args:
        grown: Factor on the tokens.
        longer: Factor on the length of rows, with which attention's arithmetic also grows.
    """
    flops = cost.flops * grown * (longer if cost.kind == "attention" else 1.0)
    moved = cost.fixed_bytes + (cost.bytes - cost.fixed_bytes) * grown
    return Cost(
        cost.place, cost.stage, cost.kind, cost.dtype, int(flops), int(moved), cost.fixed_bytes
    )


def seconds_of(cost: Cost, rates: Rates) -> tuple[str, float, float]:
    """The class of an operation, the seconds of its work, and those the device waits for it."""
    if cost.kind == "paging":
        return "transfers", cost.bytes / rates.transfer if rates.pages else 0.0, 0.0
    if cost.kind == "transfer":
        # What the host computes is bound by its memory, which is about as fast as the bus.
        return "transfers", cost.bytes / rates.transfer, 0.0
    rate = rates.flops.get(str(cost.dtype).removeprefix("torch.")) or rates.flops["float32"]
    moving = cost.bytes / (rates.bandwidth * rates.traffic)
    computing = 0.0
    if cost.flops:
        share = rates.attention if cost.kind == "attention" else rates.products
        fill = cost.flops / (cost.flops + rate * FILLING_SECONDS)
        computing = cost.flops / (rate * share * fill)
    kind = {"products": "matrix products", "attention": "attention"}.get(
        cost.kind, "memory traffic"
    )
    work = max(computing, moving)
    # The host runs ahead of the device, so a launch costs what the work before does not hide.
    return kind, work, max(0.0, rates.launch_seconds - work)
