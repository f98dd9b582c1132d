"""Which combinations of parts were run, and how that ended: the table that ships with lowres.

`lowres bench compatibility` writes it, docs/compatibility.md shows it and `lowres check` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lowres.core.errors import InputError
from lowres.core.paths import write_whole
from lowres.core.recipe import Recipe

PATH = Path(__file__).resolve().parent.parent / "assets" / "compatibility" / "cpu.json"
Outcome = Literal["works", "refused", "fails"]
PAIRED_WITH = "lora"
"""The method that pairs of levers are run with."""


@dataclass(frozen=True)
class Combination:
    """A method with levers, in the order of the recipe; a lever may have several forms."""

    method: str
    levers: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return " + ".join((self.method, *self.levers))


@dataclass
class Cell:
    """What became of a combination.

    Args:
        outcome: `works`: two updates, a save and a resume were made and agree bit for bit;
            `refused`: lowres said no; `fails`: it ought to work and does not.
        reason: Why it does not work; empty where it does.
        model: On which it was run.
        seconds: That it took.
    """

    outcome: Outcome
    reason: str
    model: str
    seconds: float


@dataclass
class Table:
    """All combinations that were tried, under which versions.

    Args:
        environment: Versions, commit, device and date of the newest cells.
    """

    environment: dict[str, Any] = field(default_factory=dict)
    cells: dict[str, Cell] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path = PATH) -> Table:
        """The table; an empty one where there is none.

        Raises:
            InputError: Where the file is no such table.
        """
        if not path.exists():
            return cls()
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            cells = {key: Cell(**cell) for key, cell in raw["cells"].items()}
            return cls(raw["environment"], cells)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"'{path}'", [f"is no compatibility table: {error}"]) from None

    def write(self, path: Path = PATH) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = {key: asdict(self.cells[key]) for key in sorted(self.cells)}
        text = json.dumps({"environment": self.environment, "cells": cells}, indent=1)
        write_whole(path, text + "\n")

    def of(self, recipe: Recipe) -> list[tuple[str, Cell | None]]:
        """What was tried of a recipe: its own combination, or else what that is made of."""
        levers = tuple(lever.form() for lever in recipe.levers)
        return [(c.key, self.cells.get(c.key)) for c in self._parts(recipe.method.name, levers)]

    def _parts(self, method: str, levers: Sequence[str]) -> Iterator[Combination]:
        whole = Combination(method, tuple(levers))
        if whole.key in self.cells or len(levers) < 2:
            yield whole
            return
        for lever in levers:
            yield Combination(method, (lever,))
        for at, first in enumerate(levers):
            for second in levers[at + 1 :]:
                yield Combination(PAIRED_WITH, (first, second))


def told(recipe: Recipe, table: Table) -> str:
    """In one line what the table says of a recipe."""
    found = table.of(recipe)
    # What is refused by its fields is refused before; here it was the model that did not suit.
    ends = {"fails": "fails", "refused": "was refused on"}
    broken = [
        f"{key} {ends[c.outcome]}{f' {c.model}' if c.outcome == 'refused' else ''}: {c.reason}"
        for key, c in found
        if c is not None and c.outcome != "works"
    ]
    if broken:
        return "; ".join(broken)
    unknown = [key for key, cell in found if cell is None]
    if unknown:
        return f"not in the compatibility table: {', '.join(unknown)}"
    how = "run" if len(found) == 1 else f"run in {len(found)} combinations of it"
    device = table.environment.get("device", "?")
    return f"compatibility: {how} on {device} (docs/compatibility.md)"
