"""Does a premise entail a hypothesis?

Paper: The PASCAL Recognising Textual Entailment challenges, in the form of SuperGLUE, Wang et al.
2019. https://arxiv.org/abs/1905.00537

Out of domain: HANS (Right for the Wrong Reasons, McCoy, Pavlick and Linzen 2019,
https://arxiv.org/abs/1902.01007), pairs that share words without entailment; from a local folder
only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lowres.core.parts import part
from lowres.tasks._labelled import Labelled, Source

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
class Rte(Labelled):
    """Metric: accuracy."""

    version: ClassVar[int] = 1
    sources: ClassVar[Mapping[str, Source]] = _SOURCES
    labels: ClassVar[tuple[str, ...]] = ("not_entailment", "entailment")
    metric: ClassVar[str] = "accuracy"
    pattern: ClassVar[str] = "{text} {pair} ?"  # minimal pattern of Mosbach et al. 2023
    label_words: ClassVar[tuple[str, ...]] = (" No", " Yes")
