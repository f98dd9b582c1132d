"""Live bytes and step time as functions of rows and length, from one trace.

At a length with a prime factor that no width of the model has, the size of a tensor tells what it
depends on: what is divisible by the length grows with the tokens, by its square with tokens times
length, and all else is fixed. So every instant of the step, over the full depth, has the form
`a + b * tokens + c * tokens * length`, and the peak is the largest of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowres.memory.roofline import Rates, paged_bytes, scaled, seconds_of
from lowres.memory.trace import LIBRARY, Cost, Trace

_PRIMES = (13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)
_FIXED = {"weights", "quantisation state", "adapters", "gradients", "optimizer states"}

Floats = NDArray[np.float64]


def probe_lengths(widths: Iterable[int]) -> list[int]:
    """Lengths to trace at, the best first: 128 times a prime needs no rounding in kernels.

    Args:
        widths: Every number of the model's configuration; the prime divides none of them.

    Raises:
        ValueError: Where every prime divides one.
    """
    told = [w for w in widths if w > 1]
    prime = next((p for p in _PRIMES if all(w % p for w in told)), None)
    if prime is None:
        raise ValueError(f"every prime of {_PRIMES} divides a width of the model")
    return [factor * prime for factor in (128, 64, 32, 8, 1)]


@dataclass(frozen=True)
class ClosedForm:
    """One recipe at any micro-batch and length; without a mask, which one row does not ask for.

    Args:
        instants: Coefficients of the bytes alive after each event, (3, events).
        work: Unlike costs with how often each occurs: forward and backward of a micro-batch.
        rest: The same of the optimizer step.
        length: At which the trace was made, with one row.
    """

    instants: Floats
    work: Counter[Cost]
    rest: Counter[Cost]
    length: int

    @classmethod
    def of(cls, trace: Trace, length: int) -> ClosedForm:
        """From the trace of a quick rehearsal with one row of `length` tokens."""
        kinds = np.zeros((3, len(trace.births)))
        for number, birth in enumerate(trace.births):
            power = 0
            fixed = birth.category in _FIXED or birth.operation.startswith(LIBRARY)
            if not fixed and birth.bytes % length == 0:
                power = 2 if birth.bytes % (length * length) == 0 else 1
            kinds[power, number] = birth.bytes / length**power
        signs = np.sign(np.array(trace.sizes, dtype=np.float64))
        instants = np.cumsum(kinds[:, np.array(trace.tensors)] * signs, axis=1)
        busy = ("forward", "recomputation", "backward")
        work = Counter(c.anywhere() for c in trace.costs if c.stage in busy)
        rest = Counter(c.anywhere() for c in trace.costs if c.stage not in busy)
        return cls(_envelope(instants), work, rest, length)

    def with_optimizer(self, base: Trace, other: Trace) -> ClosedForm:
        """The same recipe with another optimizer.

        Args:
            base: The trace that this form is of.
            other: One of the other optimizer's states and step alone.
        """
        shift = _state_bytes(other) - _state_bytes(base)
        peak = live = 0
        for size in other.sizes:
            live += size
            peak = max(peak, live)
        moved = self.instants + np.array([[float(shift)], [0.0], [0.0]])
        step = np.array([[float(peak)], [0.0], [0.0]])
        rest = Counter(c.anywhere() for c in other.costs)
        return ClosedForm(np.concatenate([moved, step], axis=1), self.work, rest, self.length)

    def peak_bytes(self, rows: int, length: int) -> int:
        """Peak of live bytes."""
        factors = np.array([1.0, rows * length, rows * length * length])
        return int((factors @ self.instants).max())

    @property
    def paged_bytes(self) -> int:
        """Of what the optimizer pages."""
        return paged_bytes(self.rest.items())

    def step_seconds(self, rates: Rates, rows: int, length: int, updates_rows: int) -> float:
        """Of an update over `updates_rows` rows in micro-batches of `rows`."""
        grown = rows * length / self.length
        ratio = length / self.length
        passes = updates_rows / rows
        busy = sum(
            times * sum(seconds_of(scaled(cost, grown, ratio), rates)[1:])
            for cost, times in self.work.items()
        )
        rest = sum(times * sum(seconds_of(c, rates)[1:]) for c, times in self.rest.items())
        return passes * busy + rest


def _state_bytes(trace: Trace) -> int:
    return sum(b.bytes for b in trace.births if b.category == "optimizer states")


def _envelope(instants: Floats) -> Floats:
    """Only instants that are the highest for some setting can be a peak: drop what is below.

    An instant that is no higher than another one in all three coefficients never is.
    """
    order = np.lexsort(instants[::-1])[::-1]
    kept: list[int] = []
    best: list[tuple[float, float]] = []
    for at in order:
        b, c = instants[1, at], instants[2, at]
        if any(b <= x and c <= y for x, y in best):
            continue
        best = [(x, y) for x, y in best if not (x <= b and y <= c)] + [(b, c)]
        kept.append(int(at))
    return instants[:, kept]
