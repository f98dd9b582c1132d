"""What tasks that ask for a label share: their scores and their baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar

from lowres.core.example import Asks, Example, Prediction
from lowres.core.metrics import Metric, accuracy, matthews
from lowres.core.parts import Task, part


@part
class Classification(Task):
    """One label a row, scored by accuracy and Matthews correlation."""

    asks: ClassVar[Asks] = "label"

    def score(
        self, examples: Sequence[Example], predictions: Sequence[Prediction]
    ) -> Mapping[str, Metric]:
        gold = [_class(example.label) for example in examples]
        predicted = [_class(prediction.value) for prediction in predictions]
        return {"accuracy": accuracy(gold, predicted), "matthews": matthews(gold, predicted)}

    def baseline(self, train: Sequence[Example], examples: Sequence[Example]) -> Prediction:
        """The most frequent label; the smallest of them when several are."""
        counts = Counter(_class(example.label) for example in train)
        return Prediction(min(counts, key=lambda label: (-counts[label], label)))


def _class(value: object) -> int:
    # A label task whose rows or predictions lack a class is a bug of the task or of the objective.
    assert isinstance(value, int), f"not a class: {value!r}"
    return value
