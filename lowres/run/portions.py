"""Which rows and micro-batches of a run a rehearsal needs to see."""

from __future__ import annotations

from collections.abc import Sequence

from lowres.core.example import Batch, Row
from lowres.core.recipe import Recipe
from lowres.run.data import Data, Order, updates_of

USUAL_UPDATES = 32
"""Updates over which the usual padding is averaged."""


def rows_of(recipe: Recipe, data: Data, step: int) -> list[Row]:
    """The rows of an update; the first two have the longest of the run."""
    order, updates = _order(recipe, data)
    return [data.train[i] for i in order.rows(min(step, updates - 1))]


def telling(batches: Sequence[Batch]) -> set[int]:
    """The first micro-batch, which meets no gradients, and the largest of those that do."""
    rest = range(1, len(batches))
    largest = max(rest, key=lambda i: sum(t.numel() for t in batches[i].values()), default=0)
    return {0, largest}


def usual_work(recipe: Recipe, data: Data) -> tuple[float, float]:
    """Padded and real tokens of an update, the mean over some of them."""
    order, updates = _order(recipe, data)
    lengths = [row.length for row in data.train]
    size = recipe.loop.micro_batch_size
    chosen = range(0, updates, max(1, updates // USUAL_UPDATES))
    padded = real = 0
    for update in chosen:
        rows = [lengths[i] for i in order.rows(update)]
        real += sum(rows)
        for at in range(0, len(rows), size):
            share = rows[at : at + size]
            padded += max(share) * len(share)
    return padded / len(chosen), real / len(chosen)


def _order(recipe: Recipe, data: Data) -> tuple[Order, int]:
    loop = recipe.loop
    updates = updates_of(recipe, len(data.train))
    lengths = [row.length for row in data.train]
    return Order(lengths, loop.global_batch_size, updates, loop.seed), updates
