"""What to change in a recipe that is refused: a lever's fields, levers, optimizer or method."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from lowres.core.compatibility import Table
from lowres.core.errors import InputError
from lowres.core.reading import load_recipe, raw_recipe

METHODS = ("lora", "bitfit", "full")
"""Tried in place of the recipe's own, in this order: the first works with most levers."""
OPTIMIZER = "adamw"
MOST_DROPPED = 2


def nearest(source: str | Path, overrides: Sequence[str], table: Table) -> list[str]:
    """Values of `--set` with each of which the recipe is accepted and no cell of the table speaks
    against it, where there are such: one with levers as they are by themselves, one with the plain
    optimizer, one with levers taken out and one with another method."""
    try:
        raw = raw_recipe(source, overrides)
    except InputError:
        return []
    levers = raw.get("levers") or []
    levers = levers if isinstance(levers, list) else []
    ways = [_without_fields(levers), _plain_optimizer(raw), _without(levers), _other_methods(raw)]
    return [change for way in ways for change in _first(way, source, overrides, table)]


def _first(
    way: Iterator[str], source: str | Path, overrides: Sequence[str], table: Table
) -> Iterator[str]:
    """The first change that works, if any does."""
    for change in way:
        try:
            recipe = load_recipe(source, [*overrides, change])
        except InputError:
            continue
        if all(cell is None or cell.outcome == "works" for _, cell in table.of(recipe)):
            yield change
            return


def _without_fields(levers: Sequence[Any]) -> Iterator[str]:
    """The list with one lever as it is when nothing is said of it."""
    for at, lever in enumerate(levers):
        if isinstance(lever, dict) and lever.keys() > {"name"}:
            yield f"levers={_flow([*levers[:at], lever['name'], *levers[at + 1 :]])}"


def _plain_optimizer(raw: dict[str, Any]) -> Iterator[str]:
    told = raw.get("optimizer")
    if isinstance(told, dict) and told.get("name") != OPTIMIZER and "lr" in told:
        yield f"optimizer={{name: {OPTIMIZER}, lr: {told['lr']}}}"


def _without(levers: Sequence[Any]) -> Iterator[str]:
    """The list with one less, then with two less; what stands last is taken out first."""
    for dropped in range(1, min(MOST_DROPPED, len(levers)) + 1):
        for out in combinations(reversed(range(len(levers))), dropped):
            left = [lever for at, lever in enumerate(levers) if at not in out]
            yield f"levers={_flow(left)}"


def _other_methods(raw: dict[str, Any]) -> Iterator[str]:
    told = raw.get("method")
    own = told.get("name") if isinstance(told, dict) else told
    return (f"method={name}" for name in METHODS if name != own)


def _flow(levers: Sequence[Any]) -> str:
    """As one would type it: names alone where there are no fields."""
    return f"[{', '.join(x if isinstance(x, str) else json.dumps(x) for x in levers)}]"
