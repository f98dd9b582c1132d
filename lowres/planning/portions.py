"""Which updates, rows and micro-batches of a run a rehearsal needs to see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowres.core.batching import batching_of
from lowres.core.example import Batch, Row, all_tokens, real_tokens
from lowres.core.recipe import Recipe
from lowres.core.rotation import Rotating
from lowres.making.data import Data, Order, updates_of

if TYPE_CHECKING:
    from lowres.core.parts import Objective

USUAL_UPDATES = 32
"""Updates over which the usual padding is averaged."""


def updates_shown(recipe: Recipe, data: Data, names: Sequence[str]) -> list[int]:
    """The first two updates; where blocks rotate, also the first two of the period that reaches
    lowest, which keeps most for backward.

    Args:
        names: Of all blocks.
    """
    freezing, updates = recipe.freezing, updates_of(recipe, len(data.train))
    if not isinstance(freezing, Rotating):
        return [0, 1]
    lowest, worst = len(names), 0
    for turn in range(-(-updates // freezing.period)):
        place = min(map(names.index, freezing.active(names, turn)))
        if place < lowest:
            lowest, worst = place, turn
        if place == 0:
            break
    first = worst * freezing.period
    more = {first, first + 1} if freezing.period > 1 else {first}
    return sorted({0, 1} | {update for update in more if update < updates})


def parts_played(recipe: Recipe, names: Sequence[str], shown: Sequence[int]) -> dict[str, Any]:
    """Whether each block trains in each of some updates; nothing where blocks do not rotate."""
    freezing = recipe.freezing
    if not isinstance(freezing, Rotating):
        return {}
    sets = [freezing.active(names, update // freezing.period) for update in shown]
    return {name: tuple(name in one for one in sets) for name in names}


def rows_of(recipe: Recipe, data: Data, step: int) -> list[Row]:
    """The rows of an update; the first two have the longest of the run."""
    order, updates = _order(recipe, data)
    return [data.train[i] for i in order.rows(min(step, updates - 1))]


def telling(
    batches: Sequence[Batch], objective: Objective | None = None, last_differs: bool = False
) -> set[int]:
    """The first micro-batch, which meets no gradients, and the largest of those that do.

    Largest are those that no other one matches in tokens, in having padding, which needs a mask,
    and in targets: any of the three may decide.

    Args:
        objective: Counts the targets, where logits are made for them alone.
        last_differs: The engine treats the last micro-batch otherwise.
    """
    sizes = [(elements(b), _padded(b), objective.targets(b) if objective else 0) for b in batches]
    rest = range(1, len(batches))

    def matched(one: int) -> bool:
        return any(
            all(x >= y for x, y in zip(sizes[other], sizes[one], strict=True))
            and (sizes[other] != sizes[one] or other < one)
            for other in rest
        )

    last = {len(batches) - 1} if last_differs else set()
    return {0, *last, *(i for i in rest if not matched(i))}


def _padded(batch: Batch) -> bool:
    return real_tokens(batch) < all_tokens(batch)


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
