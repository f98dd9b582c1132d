"""Which rows and micro-batches of a run a rehearsal needs to see."""

from __future__ import annotations

from collections.abc import Sequence

from lowres.core.batching import batching_of
from lowres.core.engine import Engine
from lowres.core.example import Batch, Row
from lowres.core.recipe import Recipe
from lowres.run.data import Data, Order, updates_of

USUAL_UPDATES = 32
"""Updates over which the usual padding is averaged."""


def rows_of(recipe: Recipe, data: Data, step: int) -> list[Row]:
    """The rows of an update; the first two have the longest of the run."""
    order, updates = _order(recipe, data)
    return [data.train[i] for i in order.rows(min(step, updates - 1))]


def telling(batches: Sequence[Batch], engine: Engine) -> set[int]:
    """The first micro-batch, which meets no gradients, and the largest of those that do; the last
    where an engine treats it otherwise (`last_differs`)."""
    rest = range(1, len(batches))
    chosen = {0, max(rest, key=lambda i: elements(batches[i]), default=0)}
    return chosen | {len(batches) - 1} if getattr(engine, "last_differs", False) else chosen


def elements(batch: Batch) -> int:
    """Of all its tensors."""
    return sum(tensor.numel() for tensor in batch.values())


def usual_work(recipe: Recipe, data: Data) -> tuple[float, float]:
    """Padded and real tokens of an update, the mean over some of them."""
    order, updates = _order(recipe, data)
    batching, size = batching_of(recipe), recipe.loop.micro_batch_size
    chosen = range(0, updates, max(1, updates // USUAL_UPDATES))
    padded = real = 0
    for update in chosen:
        rows = [data.train[i] for i in order.rows(update)]
        real += sum(row.length for row in rows)
        for group in batching.group(rows, size):
            padded += batching.tokens([row.length for row in group])
    return padded / len(chosen), real / len(chosen)


def _order(recipe: Recipe, data: Data) -> tuple[Order, int]:
    loop = recipe.loop
    updates = updates_of(recipe, len(data.train))
    lengths = [row.length for row in data.train]
    return Order(lengths, loop.global_batch_size, updates, loop.seed), updates
