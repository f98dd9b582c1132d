"""Scores with their standard errors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """A value and its standard error over the examples it was computed from."""

    value: float
    stderr: float


def accuracy(gold: Sequence[object], predicted: Sequence[object]) -> Metric:
    """Share of equal pairs; binomial standard error."""
    n = len(gold)
    p = sum(g == q for g, q in zip(gold, predicted, strict=True)) / n
    return Metric(p, math.sqrt(p * (1 - p) / n))


def _matthews(cells: dict[tuple[int, int], int]) -> float:
    """Multi-class form (Gorodkin 2004), 0 where it is undefined (one class only)."""
    n = sum(cells.values())
    right = sum(c for (g, q), c in cells.items() if g == q)
    gold: Counter[int] = Counter()
    predicted: Counter[int] = Counter()
    for (g, q), c in cells.items():
        gold[g] += c
        predicted[q] += c
    cross = sum(gold[k] * predicted[k] for k in gold)
    spread = (n * n - sum(v * v for v in gold.values())) * (
        n * n - sum(v * v for v in predicted.values())
    )
    return (right * n - cross) / math.sqrt(spread) if spread > 0 else 0.0


def matthews(gold: Sequence[int], predicted: Sequence[int]) -> Metric:
    """Matthews correlation, the metric of CoLA (Warstadt et al. 2018).

    The standard error is the jackknife's: leaving out one example changes one cell of the confusion
    table, so there are only as many different leave-one-out values as cells.
    """
    cells = dict(Counter(zip(gold, predicted, strict=True)))
    n = len(gold)
    value = _matthews(cells)
    if n < 2:
        return Metric(value, 0.0)
    left_out = [(_matthews({**cells, cell: count - 1}), count) for cell, count in cells.items()]
    mean = sum(v * c for v, c in left_out) / n
    return Metric(value, math.sqrt((n - 1) / n * sum(c * (v - mean) ** 2 for v, c in left_out)))


def mean(values: Sequence[float]) -> Metric:
    """Arithmetic mean with its standard error."""
    n = len(values)
    centre = sum(values) / n
    if n < 2:
        return Metric(centre, 0.0)
    return Metric(centre, math.sqrt(sum((v - centre) ** 2 for v in values) / (n - 1) / n))
