"""Which updates, rows and micro-batches of a run a rehearsal needs to see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lowres.core.batching import batching_of
from lowres.core.example import IGNORED, Batch, Row, all_tokens, real_tokens
from lowres.core.recipe import Recipe
from lowres.core.rotation import Rotating
from lowres.making.data import Data, Order, updates_of

if TYPE_CHECKING:
    from lowres.core.parts import Objective

USUAL_UPDATES = 32
"""Updates over which the usual padding is averaged."""


@dataclass(frozen=True)
class Shown:
    """An update that is rehearsed.

    Args:
        turn: The update whose blocks train, where blocks rotate.
        rows: The update whose rows are trained on.
    """

    turn: int
    rows: int


class Size(NamedTuple):
    """What of a micro-batch decides how much memory it takes: any of the four may.

    Args:
        inputs: Tokens that the model reads, padding included.
        labels: Elements of the labels; of an encoder-decoder the decoder's tokens.
        masked: Whether attention needs a mask, for padding or for packed rows.
        targets: Labels that are asked for, where logits are made for them alone; else 0.
    """

    inputs: int
    labels: int
    masked: bool
    targets: int

    def within(self, other: Size) -> bool:
        """Whether the other is at least as large in all."""
        return all(x <= y for x, y in zip(self, other, strict=True))


def updates_shown(
    recipe: Recipe, data: Data, names: Sequence[str], larger: Sequence[int] = ()
) -> list[Shown]:
    """The first two updates, which have the longest rows; before the second those that are `larger`
    than it in something else; and where blocks rotate, the same of the period that reaches lowest,
    which keeps most for backward.

    Args:
        names: Of all blocks.
    """
    shown = [Shown(0, 0), *(Shown(1, update) for update in larger), Shown(1, 1)]
    freezing, updates = recipe.freezing, updates_of(recipe, len(data.train))
    if not isinstance(freezing, Rotating):
        return shown
    lowest, worst = len(names), 0
    for turn in range(-(-updates // freezing.period)):
        place = min(map(names.index, freezing.active(names, turn)))
        if place < lowest:
            lowest, worst = place, turn
        if place == 0:
            break
    first = worst * freezing.period
    if freezing.period == 1:
        # States are dropped with each turn, so that none is made twice running.
        shown = [Shown(0, 0)]
        for rows in (1, *larger):
            if shown[-1].turn == first:
                shown.append(Shown(1 if first == 0 else 0, 1))
            shown.append(Shown(min(first, updates - 1), rows))
        return shown
    if first == 0:
        return shown
    shown += [Shown(first, update) for update in (1, *larger)]
    return shown + [Shown(first + 1, 1)] * (first + 1 < updates)


def larger(recipe: Recipe, data: Data, only_targets: bool, processes: int = 1) -> list[int]:
    """Updates after the first with a micro-batch that is largest in something, and larger in it
    than those of the second update.

    Args:
        only_targets: Logits are made for targets alone.
        processes: That share each update; the main one's share is looked at.
    """
    order, updates = _order(recipe, data)
    batching, size = batching_of(recipe), recipe.loop.micro_batch_size
    packed = "packed" in {one for lever in recipe.levers for one in lever.brought()}

    def sizes(update: int) -> Iterator[Size]:
        for group in batching.group(_share(order, data, update, processes), size):
            lengths = [row.length for row in group]
            inputs, alike = batching.tokens(lengths), [len(r.labels) for r in group] == lengths
            labels = inputs if alike else len(group) * max(len(row.labels) for row in group)
            masked = len(group) > 1 if packed else inputs > sum(lengths)
            every = [row.labels for row in group] if only_targets else []
            asked = sum(len(labels) - labels.count(IGNORED) for labels in every)
            yield Size(inputs, labels, masked, asked)

    seen = set(sizes(min(1, updates - 1)))
    there = {one: update for update in range(updates - 1, 0, -1) for one in sizes(update)}
    found: list[int] = []
    # The sum may be largest where none of them is.
    keys: list[Callable[[Size], int]] = [
        lambda one: one.inputs, lambda one: one.labels, lambda one: one.masked,
        lambda one: one.targets, sum,
    ]  # fmt: skip
    for what in keys:
        largest = max(there, key=lambda one: (what(one), one), default=None)
        if largest is not None and not any(largest.within(one) for one in seen):
            found.append(there[largest])
            seen |= set(sizes(there[largest]))
    return found


def played(recipe: Recipe, data: Data, shown: Sequence[Shown]) -> list[int]:
    """The updates whose rows are shown."""
    last = updates_of(recipe, len(data.train)) - 1
    return sorted({min(one.rows, last) for one in shown})


def parts_played(recipe: Recipe, names: Sequence[str], shown: Sequence[Shown]) -> dict[str, Any]:
    """Whether each block trains in each of some updates; nothing where blocks do not rotate."""
    freezing = recipe.freezing
    if not isinstance(freezing, Rotating):
        return {}
    sets = [freezing.active(names, one.turn // freezing.period) for one in shown]
    return {name: tuple(name in one for one in sets) for name in names}


def rows_of(recipe: Recipe, data: Data, step: int, processes: int = 1) -> list[Row]:
    """The main process's rows of an update; the first two updates have the longest of the run."""
    order, updates = _order(recipe, data)
    return _share(order, data, min(step, updates - 1), processes)


def _share(order: Order, data: Data, update: int, processes: int) -> list[Row]:
    rows = order.rows(update)
    return [data.train[i] for i in rows[: -(-len(rows) // processes)]]


def telling(
    batches: Sequence[Batch], objective: Objective | None = None, last_differs: bool = False
) -> set[int]:
    """The first micro-batch, which meets no gradients, and the largest of those that do.

    Largest are those that no other one matches in size.

    Args:
        objective: Counts the targets, where logits are made for them alone.
        last_differs: The engine treats the last micro-batch otherwise.
    """
    sizes = [_size(b, objective) for b in batches]
    rest = range(1, len(batches))

    def matched(one: int) -> bool:
        return any(
            sizes[one].within(sizes[other]) and (sizes[other] != sizes[one] or other < one)
            for other in rest
        )

    last = {len(batches) - 1} if last_differs else set()
    return {0, *last, *(i for i in rest if not matched(i))}


def _size(batch: Batch, objective: Objective | None) -> Size:
    masked = real_tokens(batch) < all_tokens(batch)
    if "position_ids" in batch:  # of packed rows, each of which begins at 0
        masked = int((batch["position_ids"] == 0).sum()) > 1
    targets = objective.targets(batch) if objective else 0
    return Size(all_tokens(batch), batch["labels"].numel(), masked, targets)


def elements(batch: Batch) -> int:
    """Of all its tensors."""
    return sum(tensor.numel() for tensor in batch.values())


def usual_work(recipe: Recipe, data: Data) -> tuple[float, float]:
    """Padded and real tokens of an update, the mean over some of them; rows that were encoded for
    another recipe count as far as this one's length allows."""
    order, updates = _order(recipe, data)
    batching, size = batching_of(recipe), recipe.loop.micro_batch_size
    most = recipe.loop.max_length
    chosen = range(0, updates, max(1, updates // USUAL_UPDATES))
    padded = real = 0
    for update in chosen:
        rows = [data.train[i] for i in order.rows(update)]
        real += sum(min(row.length, most) for row in rows)
        for group in batching.group(rows, size):
            padded += batching.tokens([min(row.length, most) for row in group])
    return padded / len(chosen), real / len(chosen)


def _order(recipe: Recipe, data: Data) -> tuple[Order, int]:
    loop = recipe.loop
    updates = updates_of(recipe, len(data.train))
    lengths = [row.length for row in data.train]
    return Order(lengths, loop.global_batch_size, updates, loop.seed), updates
