"""Does a premise entail a hypothesis?

Paper: The PASCAL Recognising Textual Entailment challenges, in the form of SuperGLUE, Wang et al.
2019. https://arxiv.org/abs/1905.00537

Out of domain: HANS (Right for the Wrong Reasons, McCoy, Pavlick and Linzen 2019,
https://arxiv.org/abs/1902.01007), pairs that share words without entailment; from a local folder
only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lowres.core.example import Asks, Example, Prediction
from lowres.core.metrics import Metric
from lowres.core.parts import Task, part
from lowres.tasks import _classification, _files, _labelled
from lowres.tasks._labelled import Source

_COMMON: Any = {
    "text": "premise",
    "pair": "hypothesis",
    "label": "label",
    "hub_text": "sentence1",
    "hub_pair": "sentence2",
    "hub_labels": (1, 0),
}
_SOURCES = {
    "train": Source(
        "train", spellings=("not_entailment", "entailment"),
        hub=("nyu-mll/glue", "rte", "train"), **_COMMON,
    ),
    "in_domain": Source(
        "dev", spellings=("not_entailment", "entailment"),
        hub=("nyu-mll/glue", "rte", "validation"), **_COMMON,
    ),
    "out_of_domain": Source(
        "hans_regenerated", folder="hans", spellings=("non-entailment", "entailment"), **_COMMON
    ),
}  # fmt: skip


@part
class Rte(Task):
    """Metric: accuracy.

    Args:
        folder: Local folder; None takes `rte` under the data folder, else the hub.
    """

    version: ClassVar[int] = 1
    asks: ClassVar[Asks] = "label"
    labels: ClassVar[tuple[str, ...]] = ("not_entailment", "entailment")
    metric: ClassVar[str] = "accuracy"
    pattern: ClassVar[str] = "{text} {pair} ?"  # minimal pattern of Mosbach et al. 2023
    label_words: ClassVar[tuple[str, ...]] = (" No", " Yes")

    folder: str | None = None

    def splits(self) -> tuple[str, ...]:
        return _labelled.available(_SOURCES, self._folder())

    def examples(self, split: str) -> Sequence[Example]:
        return _labelled.examples(split, _SOURCES[split], self._folder())

    def score(
        self, examples: Sequence[Example], predictions: Sequence[Prediction]
    ) -> Mapping[str, Metric]:
        return _classification.score_labels(examples, predictions)

    def baseline(self, train: Sequence[Example], examples: Sequence[Example]) -> Prediction:
        return _classification.majority(train)

    def _folder(self) -> Path | None:
        return _files.folder_of("rte", self.folder)
