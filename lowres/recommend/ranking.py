"""Which of the recipes that fit is best, and which are worth showing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from lowres.core.plan import Candidate
from lowres.recommend.combinations import Combination

Goal = Literal["quality", "speed", "context"]
SHOWN = 16
"""Candidates that a report lists."""
BEYOND = 3
"""Of these, so many that do not fit, the nearest first."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A candidate with what it was made from.

    Args:
        host_bytes: That it keeps in host memory, at the least.
    """

    candidate: Candidate
    combination: Combination
    rows: int
    length: int
    host_bytes: int = 0


def rank(choice: Choice, goal: Goal) -> tuple[float, ...]:
    c = choice.candidate
    pace = -(c.tokens_per_second or 0.0)
    worse = len(c.lossy)
    task = choice.combination.recipe.task
    sign = 1.0 if task.metric in task.lower_is_better else -1.0
    # What no record tells comes after all that one does.
    known = math.inf if c.quality is None else sign * c.quality
    if goal == "speed":
        return (pace, worse)
    preferred = choice.combination.preference
    if goal == "context":
        return (-choice.length, worse, preferred, pace)
    return (known, worse, preferred, pace)


def front(found: Sequence[Choice], wanted: int, goal: Goal) -> list[Choice]:
    """Candidates of the wanted length that no other one beats in memory, time and losses."""
    same = [c for c in found if goal == "context" or c.length == wanted]

    def figures(c: Choice) -> tuple[float, float, float, float]:
        time_ = -(c.candidate.tokens_per_second or 0.0)
        length = -c.length if goal == "context" else 0
        return (c.candidate.needed_bytes, time_, len(c.candidate.lossy), length)

    told = [(c, figures(c)) for c in same]
    front = [
        c for c, mine in told
        if not any(all(x <= y for x, y in zip(other, mine, strict=True)) and other != mine
                   for _, other in told)
    ]  # fmt: skip
    unlike: dict[tuple[float, ...], Choice] = {}
    for c in front:
        unlike.setdefault(figures(c), c)
        c.candidate.front = True
    ordered = sorted(unlike.values(), key=lambda c: (not c.candidate.fits, rank(c, goal)))
    fitting = [c for c in ordered if c.candidate.fits][: SHOWN - BEYOND]
    beyond = sorted((c for c in ordered if not c.candidate.fits), key=needed)
    return fitting + beyond[:BEYOND]


def needed(choice: Choice) -> int:
    return choice.candidate.needed_bytes
