"""Lengths on both sides of a budget: the longest that is planned to fit, and the next one.

These pairs decide how often the planner is wrong about what fits: far from a budget any planner is
right. The search needs no GPU, so it can be made beforehand; its result is kept in a file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.recipes import SHORTEST, STRIDE, Case, located
from lowres.core.example import IGNORED, Row
from lowres.core.plan import MemoryPlan
from lowres.core.recipe import Recipe
from lowres.making.build import Inputs
from lowres.making.data import number
from lowres.memory import device as devices
from lowres.memory.catalogue import Device
from lowres.memory.tracer import TraceFailed
from lowres.planning.assumed import assumed_inputs
from lowres.planning.plan import plan


class NoBoundary(Exception):
    """The planner says the same of every length."""


def search(fits: Callable[[int], bool], shortest: int, longest: int, stride: int) -> int | None:
    """The longest of `shortest`, `shortest + stride`, ... that fits while the next does not.

    None where all or none of them fit. Lengths are thought to fit up to some length.
    """
    low, high = 0, (longest - shortest) // stride
    if high < 1 or not fits(shortest) or fits(shortest + high * stride):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if fits(shortest + middle * stride):
            low = middle
        else:
            high = middle
    return shortest + low * stride


@dataclasses.dataclass
class Foreseen:
    """A recipe with all that can be known before its weights exist.

    Args:
        plan: None where its code cannot be traced, as the remark tells.
        device: That it is planned for.
    """

    recipe: Recipe
    local: Recipe
    inputs: Inputs
    plan: MemoryPlan | None
    device: Device | None
    remark: str | None = None


def fitting(found: Foreseen) -> bool:
    """Whether it is planned to fit."""
    return bool(found.plan and found.plan.fits)


def foresee(case: Case, folder: Path, device: Device | None, length: int | None) -> Foreseen:
    """Plan a case at a length.

    Args:
        folder: Of its model's configuration.
        length: None for the recipe's own.
    """
    recipe = case.recipe(length)
    local = located(recipe, folder)
    inputs = assumed_inputs(local, padded=False)
    told = f"assumed: every row has {recipe.loop.max_length} tokens"
    if case.varied:
        told = f"assumed: rows have 1 to 4 quarters of {recipe.loop.max_length} tokens by turns"
        vocabulary = inputs.config.get_text_config().vocab_size
        train = [_varied(row, n, vocabulary) for n, row in enumerate(inputs.data.train)]
        number(train)
        inputs = dataclasses.replace(inputs, data=dataclasses.replace(inputs.data, train=train))
    if isinstance(case.card, str):
        device = devices.load(case.card)
    elif case.card is not None:
        device = devices.generic(case.card)
    try:
        found = plan(local, device, inputs=inputs)
    except TraceFailed as why:
        return Foreseen(recipe, local, inputs, None, device, f"no plan: {why}")
    return Foreseen(recipe, local, inputs, dataclasses.replace(found, shapes=told), device)


def _varied(row: Row, number: int, vocabulary: int) -> Row:
    """The beginning of a row, of other tokens: whether rows are kept apart must be seen."""
    length = max(2, row.length * (number % 4 + 1) // 4)
    inputs = {name: values[:length] for name, values in row.inputs.items()}
    ids = random.Random(number).choices(range(vocabulary), k=length)
    labels = [i if old != IGNORED else old for i, old in zip(ids, row.labels, strict=False)]
    return dataclasses.replace(row, inputs=inputs | {"input_ids": ids}, labels=labels)


def foresee_side(
    case: Case, folder: Path, device: Device | None, home: Path, again: bool = False
) -> Foreseen:
    """Plan a case of a boundary, at the length that is kept for it in `home`.

    Searched for where it is not kept, or where the planner has changed its mind since.

    Raises:
        NoBoundary: Where every length fits, or none.
    """
    place = home / f"{case.boundary}.json"
    if again or not place.exists():
        fits = lambda length: fitting(foresee(case, folder, device, length))
        below = search(fits, SHORTEST, case.longest, STRIDE)
        kept = {"below": below, "above": None if below is None else below + STRIDE}
        home.mkdir(parents=True, exist_ok=True)
        aside = home / f"{case.boundary}.{os.getpid()}"
        aside.write_text(json.dumps(kept) + "\n", encoding="utf-8")
        aside.replace(place)
    length = json.loads(place.read_text(encoding="utf-8"))[case.side]
    if length is None:
        raise NoBoundary(f"every length up to {case.longest} fits, or none does")
    found = foresee(case, folder, device, length)
    if fitting(found) is (case.side == "below") or again:
        return found
    return foresee_side(case, folder, device, home, again=True)
