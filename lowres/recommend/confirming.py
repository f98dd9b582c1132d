"""The choice among weighed candidates: the best one that a full plan confirms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from lowres.core.errors import InputError, Problem
from lowres.core.example import Row
from lowres.core.parts import Lever
from lowres.core.plan import Card, Change, MemoryPlan
from lowres.core.reading import load_recipe
from lowres.core.recipe import Recipe
from lowres.core.units import GIB
from lowres.making.data import Data, updates_of
from lowres.memory.catalogue import Device
from lowres.planning.plan import host_limit, plan
from lowres.planning.portions import usual_work
from lowres.recommend.combinations import LENGTHS
from lowres.recommend.ranking import Choice, Goal, needed, rank

WANTED_LENGTH = 512
"""Where the data are not at hand: rows of this length are to fit, if any do."""
TRIES = 8
"""Candidates that are planned in full before the smallest one has the last word."""


def recipe_of(choice: Choice) -> Recipe:
    """The candidate as a recipe."""
    sizes = [f"loop.max_length={choice.length}", f"loop.micro_batch_size={choice.rows}"]
    return load_recipe(choice.combination.raw, sizes)


def whole_length(rows: Sequence[Row] | None, longest: int) -> int:
    """The shortest length of a search that loses no row."""
    wanted = min(WANTED_LENGTH, longest) if rows is None else max(row.length for row in rows)
    return next((n for n in LENGTHS if n >= wanted), longest)


def wanted_length(wanted: int, found: Sequence[Choice], notes: list[str]) -> int:
    """The length wanted, or the longest below it that fits at all."""
    fitting = sorted({c.length for c in found if c.candidate.fits and c.length <= wanted})
    if fitting and fitting[-1] < wanted:
        notes.append(
            f"rows of {wanted} tokens fit with nothing; the longest that do: {fitting[-1]}"
        )
        return fitting[-1]
    return min(wanted, max(c.length for c in found))


def in_time(
    pool: list[Choice], data: Data | None, minutes: float, notes: list[str]
) -> list[Choice]:
    """Those that train within the minutes, where the number of updates and their time are known.

    Raises:
        InputError: Where none does.
    """
    timed = [c for c in pool if c.candidate.seconds is not None]
    if data is None or not timed:
        missing = "the data are not at hand" if data is None else "the card's rates are not known"
        notes.append(f"--minutes is written into the recipe alone: {missing}, so no time is known")
        return pool

    shares: dict[tuple[int, int, str], float] = {}

    def needed_minutes(choice: Choice) -> float:
        # Its time is that of an update whose rows are all as long as allowed.
        recipe, rows, length = choice.combination.recipe, choice.rows, choice.length
        changes = [one for one in recipe.levers if type(one).on_batching is not Lever.on_batching]
        batching = repr(changes)
        if (rows, length, batching) not in shares:
            sized = dataclasses.replace(recipe.loop, max_length=length, micro_batch_size=rows)
            usual, _ = usual_work(dataclasses.replace(recipe, loop=sized), data)
            shares[rows, length, batching] = usual / (recipe.loop.global_batch_size * length)
        share = shares[rows, length, batching]
        return (choice.candidate.seconds or 0.0) * share * updates_of(recipe, len(data.train)) / 60

    told = {id(c): needed_minutes(c) for c in timed}
    kept = [c for c in timed if told[id(c)] <= minutes]
    if not kept:
        least = min(told.values())
        text = f"{minutes:g} minutes are too few; the fastest recipe is planned to take {least:.0f}"
        raise InputError("the search", [Problem("--minutes", text)])
    return kept


def choose(
    pool: Sequence[Choice], device: Device, card: Card, goal: Goal, notes: list[str]
) -> tuple[Choice | None, MemoryPlan | None]:
    """The best by the closed form that the full plan confirms, at the top of its band, too. What
    keeps more in host memory than there is comes last."""
    limit = host_limit(pool[0].combination.recipe, device)
    host_bytes = math.inf if limit is None else limit[0]
    fitting = [c for c in pool if c.candidate.fits]
    fitting.sort(key=lambda c: (c.host_bytes > host_bytes, *rank(c, goal)))
    smallest = min(fitting, key=lambda c: (c.host_bytes > host_bytes, needed(c)), default=None)
    most, tried = math.inf, 0
    for choice in fitting:
        promised = needed(choice)
        if promised > most or (tried >= TRIES and choice is not smallest):
            continue
        tried += 1
        confirmed = plan(recipe_of(choice), device)
        excess = confirmed.needed_bytes + confirmed.band_bytes
        excess -= card.offered_bytes
        choice.candidate.needed_bytes = confirmed.needed_bytes
        if excess <= 0 and confirmed.host_fits is not False:
            return choice, confirmed
        choice.candidate.fits = False
        told = ", ".join(str(v) for v in choice.candidate.settings.values())
        why = "leaves less than its band" if excess > 0 else "needs more host memory than there is"
        notes.append(f"planned in full, it {why}: {told}")
        if excess > 0:
            # What the closed form does not see (evaluation, the allocator) others will need, too.
            most = min(most, promised - excess)
    return None, None


def instead(
    found: Sequence[Choice], pool: Sequence[Choice], device: Device, card: Card
) -> Iterator[Change]:
    """What would fit where nothing does: a larger card, a shorter row, a smaller model."""
    least = min(found, key=needed)
    wanted = min(pool, key=needed)
    sizes = {}
    for choice in (least, wanted):
        confirmed = plan(recipe_of(choice), device)
        sizes[choice.length] = confirmed.needed_bytes + confirmed.band_bytes
        told = ", ".join(str(v) for v in choice.candidate.settings.values())
        yield Change(
            f"a card that offers {sizes[choice.length] / GIB:.1f} GiB, for rows of {choice.length} "
            f"tokens ({told})",
            [],
            needed_bytes=sizes[choice.length],
        )
        if least.length == wanted.length:
            break
    share = card.available_bytes / max(1, sizes[least.length] - card.context_bytes)
    if share < 1:
        yield Change(
            f"a model of about {share:.0%} of this one's size, with the same choices", [],
            needed_bytes=card.offered_bytes,
        )  # fmt: skip
