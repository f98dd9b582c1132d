"""Is the sentiment of a film review sentence positive?

Paper: Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank, Socher et al.
2013. https://aclanthology.org/D13-1170

Out of domain: product reviews (Hu and Liu 2004), whole film reviews and their counterfactual
rewritings (Kaushik, Hovy and Lipton 2020, https://arxiv.org/abs/1909.12434); from a local folder
only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lowres.core.parts import part
from lowres.tasks._labelled import Labelled, Source

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
class Sst2(Labelled):
    """Metric: accuracy."""

    version: ClassVar[int] = 1
    sources: ClassVar[Mapping[str, Source]] = _SOURCES
    labels: ClassVar[tuple[str, ...]] = ("negative", "positive")
    metric: ClassVar[str] = "accuracy"
    pattern: ClassVar[str] = "{text} It was"
    published_overlap: ClassVar[int] = 2
    label_words: ClassVar[tuple[str, ...]] = (" terrible", " great")
