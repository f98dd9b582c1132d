"""What papers found of methods beside each other: `assets/findings/methods.yaml`, checked.

Each entry names its source; nothing here is measured by lowres.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Literal

import yaml
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from lowres.core.learner import Kind

FILE = Path(__file__).resolve().parent.parent / "assets" / "findings" / "methods.yaml"

TaskKind = Literal["classification", "generation"]
_STRICT = ConfigDict(extra="forbid")


@dataclass(config=_STRICT, frozen=True)
class Comparison:
    """Methods beside each other under one protocol.

    Args:
        basis: Whether it was read in the paper's text or in a digest of it.
        setting: Model, data, metric.
        model: Kind of the model that was trained.
        kind: Of the tasks; None for both.
        rows: Training rows for which it is taken to speak, from and to; None for no end.
        scores: Method to score, higher is better; or
        leads: methods that lead, then those that follow.
    """

    source: str
    url: str
    basis: Literal["text", "digest"]
    setting: str
    model: Kind
    kind: TaskKind | None
    rows: tuple[int, int | None]
    scores: dict[str, float] = field(default_factory=dict)
    leads: tuple[tuple[str, ...], ...] = ()

    def speaks_for(self, rows: int, kind: TaskKind) -> bool:
        low, high = self.rows
        return low <= rows and (high is None or rows <= high) and self.kind in (None, kind)

    def places(self) -> dict[str, float]:
        """Method to where it stands between the worst (0) and the best (1).

        Of an order each has the mean rank of its tier; of scores as `place` says.
        """
        if self.leads:
            last = sum(map(len, self.leads)) - 1
            out: dict[str, float] = {}
            ahead = 0
            for tier in self.leads:
                out |= dict.fromkeys(tier, 1 - (ahead + (len(tier) - 1) / 2) / last)
                ahead += len(tier)
            return out
        low, high = min(self.scores.values()), max(self.scores.values())
        return {name: place(score, low, high) for name, score in self.scores.items()}

    def told(self, method: str) -> str:
        """What it says of a method, in a few words."""
        if self.leads:
            return "leads" if method in self.leads[0] else f"behind {' and '.join(self.leads[0])}"
        low, high = min(self.scores.values()), max(self.scores.values())
        return f"{self.scores[method]:g} between {low:g} and {high:g}"


def place(score: float, low: float, high: float) -> float:
    """Where a score stands between the worst (0) and the best (1), higher being better.

    Where these lie closer together than a twentieth of the best, all stay that much nearer to the
    middle: so small a difference says little of another task.
    """
    spread, middle = max(high - low, abs(high) / 20), (low + high) / 2
    return 0.5 + (score - middle) / spread


@dataclass(config=_STRICT, frozen=True)
class Remark:
    """What a table does not say."""

    methods: tuple[str, ...]
    says: str
    source: str
    url: str


@dataclass(config=_STRICT, frozen=True)
class Findings:
    tables: tuple[Comparison, ...]
    remarks: tuple[Remark, ...]


def read(file: Path = FILE) -> Findings:
    """All findings of the package."""
    found = TypeAdapter(Findings).validate_python(yaml.safe_load(file.read_text(encoding="utf-8")))
    for table in found.tables:
        if len(table.leads) == 1 or len(table.leads or table.scores) < 2:
            raise ValueError(f"{file}: '{table.setting}' compares nothing; give two or more")
    return found
