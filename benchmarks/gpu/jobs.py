"""What a suite asks of the process of one recipe, and where that leaves its record."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu import lever_recipes, recipes, tiny
from benchmarks.gpu.recipes import Case
from lowres.core import record as records
from lowres.core.record import RunRecord

POSTPONED, SKIPPED = 75, 76
"""Exit codes: no time was left for it; this machine cannot run it (the reason was printed)."""

Suite = Literal["planner", "levers"]


def cases_of(suite: Suite, small: bool) -> list[Case]:
    """The recipes of a suite, or its small ones for a CPU."""
    if suite == "levers":
        return lever_recipes.cases(small)
    return tiny.cases() if small else recipes.cases()


@dataclasses.dataclass
class Job:
    """What the command asks of a process.

    Args:
        configs: Holds a folder of each model.
        scratch: For weights, saved models and the lock.
        deadline: By `time.time()`; None for no hurry.
        commit: Of the checkout, where it travels without its history.
    """

    name: str
    tiny: bool
    configs: str
    scratch: str
    records: str
    deadline: float | None = None
    commit: str | None = None
    suite: Suite = "planner"

    @property
    def case(self) -> Case:
        return next(c for c in cases_of(self.suite, self.tiny) if c.name == self.name)


def write(home: Path, name: str, record: RunRecord, suite: dict[str, Any]) -> None:
    """A run's record with what this suite adds, written aside and renamed."""
    whole = json.loads(records.to_json(record)) | {"suite": suite}
    aside = home / f"{name}.partial"
    aside.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, home / f"{name}.json")
