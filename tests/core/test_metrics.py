"""Scores against closed forms and a brute-force jackknife."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowres.core import metrics
from lowres.core.metrics import Metric


def test_matthews_of_a_known_table() -> None:
    """Closed form: TP 3, TN 2, FP 1, FN 2 gives (3*2 - 1*2) / sqrt(4*5*3*4)."""
    gold = [1] * 5 + [0] * 3
    predicted = [1, 1, 1, 0, 0, 1, 0, 0]
    assert metrics.matthews(gold, predicted).value == pytest.approx(4 / math.sqrt(4 * 5 * 3 * 4))


def test_accuracy_and_its_error() -> None:
    """Closed form: binomial."""
    assert metrics.accuracy([1, 1, 0, 0], [1, 1, 0, 1]) == Metric(0.75, math.sqrt(0.75 * 0.25 / 4))


def test_mean_and_its_error() -> None:
    """Closed form."""
    assert metrics.mean([1.0, 2.0, 3.0]) == Metric(2.0, pytest.approx(1 / math.sqrt(3)))


labels = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=3, max_size=25)


@settings(max_examples=60, deadline=None)
@given(labels)
def test_the_jackknife_equals_leaving_out_each_example(pairs: list[tuple[int, int]]) -> None:
    """Reference: the definition, one example at a time."""
    gold, predicted = [g for g, _ in pairs], [q for _, q in pairs]
    n = len(pairs)
    left_out = [
        metrics.matthews(gold[:i] + gold[i + 1 :], predicted[:i] + predicted[i + 1 :]).value
        for i in range(n)
    ]
    mean = sum(left_out) / n
    expected = math.sqrt((n - 1) / n * sum((v - mean) ** 2 for v in left_out))
    assert metrics.matthews(gold, predicted).stderr == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(labels)
def test_matthews_is_bounded_symmetric_and_one_for_the_truth(pairs: list[tuple[int, int]]) -> None:
    """Behaviour: properties of a correlation."""
    gold, predicted = [g for g, _ in pairs], [q for _, q in pairs]
    value = metrics.matthews(gold, predicted).value
    assert -1 - 1e-9 <= value <= 1 + 1e-9
    assert value == pytest.approx(metrics.matthews(predicted, gold).value)
    if len(set(gold)) > 1:
        assert metrics.matthews(gold, gold).value == pytest.approx(1.0)
