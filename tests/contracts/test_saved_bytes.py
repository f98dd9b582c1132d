"""What levers save, from the record of `python -m benchmarks.levers`: measured beside planned."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.levers import PAGE, RECORD, measurable, measured, recipe, table
from lowres.core import registry
from tests.conftest import sample_part

LEVERS = measurable()


@pytest.fixture(scope="module")
def rows() -> Any:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def test_every_lever_was_measured_and_the_page_shows_it(rows: Any) -> None:
    """Behaviour: no lever without figures; the page is the record's table."""
    assert list(rows["levers"]) == LEVERS
    assert table(rows) in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", LEVERS)
def test_a_lever_saves_what_the_ladder_says(name: str, rows: Any) -> None:
    """Reference: live bytes measured with and without it; within 1 % of those without."""
    row = rows["levers"][name]
    saved = row["before"] - row["after"]
    if registry.load("lever", name).searched is not None:  # type: ignore[attr-defined]
        assert saved > 0
    assert abs(saved - row["planned"]) <= 0.01 * row["before"]


def test_a_row_is_what_is_measured_now(rows: Any, in_folder: Any) -> None:
    """Reference: the record, by the same runs again."""
    name = "gradient_checkpointing"
    assert measured(recipe(name, [sample_part("lever", name)]))[0] == rows["levers"][name]["after"]
