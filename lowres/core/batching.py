"""How the rows of an update become micro-batches: which rows lie together, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lowres.core.example import Batch, Row, collate
from lowres.core.parts import fold
from lowres.core.recipe import Recipe


@dataclass(frozen=True)
class Batching:
    """Levers replace its functions in `on_batching`; whatever they do, each row of the update is in
    exactly one micro-batch, so that the global batch stays what it is.

    Args:
        group: Rows of one process's share of an update and the rows of a micro-batch at most, to
            the rows of each micro-batch.
        collate: Rows of one micro-batch, padding id and side, to its tensors.
        tokens: Lengths of the rows of one micro-batch, to the elements of its `input_ids`.
    """

    group: Callable[[Sequence[Row], int], list[list[Row]]]
    collate: Callable[[Sequence[Row], int, Literal["left", "right"]], Batch]
    tokens: Callable[[Sequence[int]], int]


def in_order(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Portions of `size` rows, the last one smaller where they do not divide."""
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def padded(lengths: Sequence[int]) -> int:
    """Tokens of rows that are padded to the longest."""
    return max(lengths) * len(lengths)


def batching_of(recipe: Recipe) -> Batching:
    """Rows in the order of the update, padded, with what the levers change in it."""
    return fold(Batching(in_order, collate, padded), recipe.levers, "on_batching")
