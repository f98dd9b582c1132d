"""What levers save, from the record of `python -m benchmarks.levers`: measured beside planned."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.levers import RECORD, ROWS, foreseen, lever_of, pair, runs_of
from lowres.core import registry
from tests.conftest import sampled


@pytest.fixture(scope="module")
def rows() -> Any:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def test_every_lever_was_measured(rows: Any) -> None:
    """Behaviour: no lever without figures."""
    assert list(rows["levers"]) == ROWS


@pytest.mark.parametrize("name", ROWS)
def test_a_lever_saves_what_the_ladder_says(name: str, rows: Any) -> None:
    """Reference: live bytes measured with and without it; within 1 % of what it saves."""
    row = rows["levers"][name]
    saved = row["before"] - row["after"]
    if registry.load("lever", lever_of(name)).searched is not None:  # type: ignore[attr-defined]
        assert saved > 0
    assert abs(saved - row["planned"]) <= 0.01 * abs(saved)


@pytest.mark.parametrize("name", sampled(ROWS, every=5))
def test_a_lever_is_planned_as_in_the_record(name: str, rows: Any) -> None:
    """Reference: what it saved when it was measured, by today's planner."""
    row = rows["levers"][name]
    assert abs(row["before"] - row["after"] - foreseen(name)) <= 0.01 * abs(foreseen(name))


@pytest.mark.parametrize("name", sampled(ROWS, every=5))
def test_a_row_is_what_is_measured_now(name: str, rows: Any, in_folder: Any) -> None:
    """Reference: the record, by the same runs again."""
    row = rows["levers"][name]
    (before, _), (after, _) = runs_of(name, pair(name))
    assert (before, after) == (row["before"], row["after"])
