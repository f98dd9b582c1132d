"""From an event stream to what a plan says of it: peaks, what they are made of, the curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from lowres.core.plan import CATEGORIES, Category, Curve
from lowres.memory.trace import OUTSIDE, Birth, Trace

Ints = NDArray[np.int64]

CURVE_POINTS = 240


@dataclass(frozen=True)
class Peak:
    """The largest sum of live bytes in a stretch of events.

    Args:
        event: Its number.
        categories: Bytes of each category alive then.
    """

    event: int
    live_bytes: int
    categories: dict[Category, int]
    instant: str
    module: str
    operation: str


class Summary:
    """Answers about one trace.

    Args:
        names: Paths of all blocks of the model, by place.
        vocabulary: Rows of the embedding table; tensors of that width in a step are logits. 0
            where there is none.
    """

    def __init__(self, trace: Trace, names: Sequence[str], vocabulary: int) -> None:
        self.trace, self.names = trace, names
        self._category = np.array(
            [CATEGORIES.index(category_of(b, vocabulary)) for b in trace.births], dtype=np.int64
        )
        self.sizes: Ints = np.array(trace.sizes, dtype=np.int64)
        self.tensors: Ints = np.array(trace.tensors, dtype=np.int64)
        self.live: Ints = np.cumsum(self.sizes)
        self.bounds = {
            name: (begin, end)
            for (name, begin), (_, end) in zip(trace.marks, trace.marks[1:], strict=False)
        }

    def peak(self, begin: int, end: int) -> Peak:
        """The peak between two events; of an empty stretch, what is alive there."""
        at = begin + int(self.live[begin:end].argmax()) if end > begin else begin - 1
        if at < 0:
            return Peak(0, 0, {}, "", "", "")
        birth = self.trace.births[self.trace.tensors[at]]
        if end <= begin:
            return Peak(at, int(self.live[at]), self.categories(at), "between steps", "", "")
        return Peak(
            at, int(self.live[at]), self.categories(at), self.instant(birth), birth.module,
            birth.operation,
        )  # fmt: skip

    def categories(self, event: int) -> dict[Category, int]:
        """Bytes alive after an event, by category; those without any are left out."""
        sums = np.zeros(len(CATEGORIES), dtype=np.int64)
        np.add.at(sums, self._category[self.tensors[: event + 1]], self.sizes[: event + 1])
        return {CATEGORIES[i]: int(n) for i, n in enumerate(sums) if n}

    def instant(self, birth: Birth) -> str:
        """What was going on when a tensor was born."""
        if birth.place == OUTSIDE:
            where = {
                "forward": "embeddings, head and loss",
                "backward": "loss, head and embeddings",
            }
            return f"{birth.stage}: {where[birth.stage]}" if birth.stage in where else birth.stage
        return f"{birth.stage} of {self.names[birth.place]}"

    def curve(self, begin: int, end: int) -> Curve:
        """Live bytes by category over a stretch: `CURVE_POINTS` points, each the peak around it."""
        chosen = []
        for part in np.array_split(np.arange(begin, end), min(CURVE_POINTS, max(1, end - begin))):
            if len(part):
                chosen.append(int(part[self.live[part].argmax()]))
        before = np.zeros(len(CATEGORIES), dtype=np.int64)
        at = 0
        columns, instants = [], []
        for event in chosen:
            stretch = slice(at, event + 1)
            np.add.at(before, self._category[self.tensors[stretch]], self.sizes[stretch])
            at = event + 1
            columns.append(before.copy())
            instants.append(self.instant(self.trace.births[self.trace.tensors[event]]))
        table = np.stack(columns, axis=1) if columns else np.zeros((len(CATEGORIES), 0), np.int64)
        kept = {
            CATEGORIES[i]: cast("list[int]", row.tolist())
            for i, row in enumerate(table)
            if row.any()
        }
        return Curve(kept, instants)


def category_of(birth: Birth, vocabulary: int) -> Category:
    """What a tensor is, from where it came."""
    if birth.category:
        return cast("Category", birth.category)
    in_step = birth.stage in ("forward", "backward", "predict")
    if vocabulary and birth.width == vocabulary and in_step:
        return "logits"
    if birth.stage in ("forward", "recomputation", "predict"):
        return "activations"
    return "temporaries"
