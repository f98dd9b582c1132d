"""Is an English sentence acceptable? Sentences from linguistics publications.

Paper: Neural Network Acceptability Judgments, Warstadt, Singh and Bowman 2018.
https://arxiv.org/abs/1805.12471

In-domain rows come from the 17 sources of the training rows, out-of-domain rows from 6 others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lowres.core.parts import part
from lowres.tasks._labelled import Labelled, Source

_COMMON: Any = {"text": "sentence", "label": "label", "spellings": ("0", "1")}
_SOURCES = {
    "train": Source("in_domain_train", hub=("nyu-mll/glue", "cola", "train"), **_COMMON),
    # GLUE's validation split is the in-domain file followed by the out-of-domain file.
    "in_domain": Source(
        "in_domain_dev",
        hub=("nyu-mll/glue", "cola", "validation"), hub_rows=(0, 527), **_COMMON,
    ),
    "out_of_domain": Source(
        "out_of_domain_dev",
        hub=("nyu-mll/glue", "cola", "validation"), hub_rows=(527, None), **_COMMON,
    ),
}  # fmt: skip


@part
class Cola(Labelled):
    """Metric: Matthews correlation."""

    version: ClassVar[int] = 1
    sources: ClassVar[Mapping[str, Source]] = _SOURCES
    labels: ClassVar[tuple[str, ...]] = ("unacceptable", "acceptable")
    metric: ClassVar[str] = "matthews"
    pattern: ClassVar[str] = "{text} ?"  # minimal pattern of Mosbach et al. 2023
    published_overlap: ClassVar[int] = 18
    label_words: ClassVar[tuple[str, ...]] = (" No", " Yes")
