"""What to change in a recipe that is refused: the fewest levers less, or another method."""

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
MOST_DROPPED = 2


def nearest(source: str | Path, overrides: Sequence[str], table: Table) -> list[str]:
    """Values of `--set` with each of which the recipe is accepted and no cell of the table speaks
    against it: one with levers taken out, and one with another method, where there are such."""
    try:
        raw = raw_recipe(source, overrides)
    except InputError:
        return []
    levers = raw.get("levers") or []
    ways = [_without(levers if isinstance(levers, list) else []), _other_methods(raw)]
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
