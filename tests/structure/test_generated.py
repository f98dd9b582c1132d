"""Pages that are made from records are what the records say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import freezing, methods, methods_page
from benchmarks.planner.tables import PAGE, filled
from lowres.core import registry


def test_the_planning_page_is_made_from_its_records() -> None:
    """Reference: `make planning` would change nothing."""
    text = PAGE.read_text(encoding="utf-8")
    assert filled(text) == text


def test_the_page_on_freezing_is_made_from_its_record() -> None:
    """Reference: `python -m benchmarks.freezing` wrote both."""
    text = freezing.PAGE.read_text(encoding="utf-8")
    record = json.loads(freezing.RECORD.read_text(encoding="utf-8"))
    assert freezing.filled(text, record) == text


def test_the_page_on_methods_is_made_from_its_records() -> None:
    """Reference: `python -m benchmarks.methods --page` would change nothing."""
    text = methods.PAGE.read_text(encoding="utf-8")
    assert methods_page.filled(text, methods.records()) == text


def test_every_method_was_measured() -> None:
    """Behaviour: `python -m benchmarks.methods` measures those that are missing here."""
    records = methods.records()
    assert sorted(records) == registry.names("method")
    assert all(record["shape"] == methods.SHAPE for record in records.values())
    assert all("measured" in record for record in records.values())


@pytest.mark.parametrize(("name", "record"), methods.records().items())
def test_what_a_method_keeps_is_what_the_planner_says(name: str, record: dict[str, Any]) -> None:
    """Reference: live bytes of the run; each within 1 %, or within a KiB where it is that small."""
    if "refused" in record:
        assert name in record["refused"] or "`" in record["refused"]
        return
    for figure in methods.FIGURES:
        measured, planned = record["measured"][figure], record["planned"][figure]
        assert abs(planned - measured) <= max(0.01 * measured, 1024), figure
