"""Is the sentiment of a film review sentence positive?

Paper: Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank, Socher et al.
2013. https://aclanthology.org/D13-1170

Out of domain: product reviews (Hu and Liu 2004), whole film reviews and their counterfactual
rewritings (Kaushik, Hovy and Lipton 2020, https://arxiv.org/abs/1909.12434); from a local folder
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

_COMMON: Any = {"text": "sentence", "label": "label", "spellings": ("0", "1")}
_SOURCES = {
    "train": Source("train", hub=("stanfordnlp/sst2", None, "train"), **_COMMON),
    "in_domain": Source("dev", hub=("stanfordnlp/sst2", None, "validation"), **_COMMON),
    "in_domain_test": Source("test", **_COMMON),
    "out_of_domain_products": Source("ood_customer_reviews", **_COMMON),
    "out_of_domain_films": Source("ood_imdb_original_test", **_COMMON),
    "out_of_domain_counterfactual": Source("ood_imdb_counterfactual_test", **_COMMON),
}


@part
class Sst2(Task):
    """Metric: accuracy.

    Args:
        folder: Local folder; None takes `sst2` under the data folder, else the hub.
    """

    version: ClassVar[int] = 1
    asks: ClassVar[Asks] = "label"
    labels: ClassVar[tuple[str, ...]] = ("negative", "positive")
    metric: ClassVar[str] = "accuracy"
    pattern: ClassVar[str] = "{text} It was"
    published_overlap: ClassVar[int] = 2
    label_words: ClassVar[tuple[str, ...]] = (" terrible", " great")

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
        return _files.folder_of("sst2", self.folder)
