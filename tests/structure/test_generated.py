"""Pages that are made from records are what the records say."""

from __future__ import annotations

import json

from benchmarks import freezing
from benchmarks.planner.tables import PAGE, filled


def test_the_planning_page_is_made_from_its_records() -> None:
    """Reference: `make planning` would change nothing."""
    text = PAGE.read_text(encoding="utf-8")
    assert filled(text) == text


def test_the_page_on_freezing_is_made_from_its_record() -> None:
    """Reference: `python -m benchmarks.freezing` wrote both."""
    text = freezing.PAGE.read_text(encoding="utf-8")
    record = json.loads(freezing.RECORD.read_text(encoding="utf-8"))
    assert freezing.filled(text, record) == text
