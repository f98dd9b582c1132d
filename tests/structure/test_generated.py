"""Pages that are made from records are what the records say."""

from __future__ import annotations

from benchmarks.planner.tables import PAGE, filled


def test_the_planning_page_is_made_from_its_records() -> None:
    """Reference: `make planning` would change nothing."""
    text = PAGE.read_text(encoding="utf-8")
    assert filled(text) == text
