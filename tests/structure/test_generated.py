"""Pages that are made from records are what the records say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import freezing, methods, methods_page, page, pages
from benchmarks.levers import ROOT
from lowres.core import registry
from lowres.core.method import Method
from tests.conftest import sampled


def test_all_pages_of_records_are_looked_at() -> None:
    """Behaviour: `make pages` makes each page that has a generated part."""
    made = [module.PAGE for module in pages.MADE]
    marked = {p for p in (ROOT / "docs").glob("*.md") if "<!-- generated: " in p.read_text("utf-8")}
    assert marked <= set(made) and len(set(made)) == len(made) == 8


@pytest.mark.parametrize("module", pages.MADE, ids=lambda module: module.__name__)
def test_a_page_is_made_of_its_records(module: Any) -> None:
    """Reference: `make pages` would change nothing."""
    assert module.PAGE.read_text(encoding="utf-8") == module.text()


def test_a_part_without_its_place_is_told() -> None:
    """Behaviour: a page that lost its marks, or has them twice, is not left as it is in silence."""
    place = "<!-- generated: part -->\nold\n<!-- end -->"
    assert page.put(f"a\n{place}\nb", "part", "new") == f"a\n{place.replace('old', 'new')}\nb"
    for text, count in (("a", 0), (place * 2, 2)):
        with pytest.raises(ValueError, match=f"{count} places for 'part'"):
            page.put(text, "part", "new")


@pytest.mark.parametrize(
    ("trains", "refuses", "says"),
    [
        (False, {}, "yes"),
        (False, {"divided": ""}, "yes"),
        (False, {"nf4": ""}, "8 bits only"),
        (False, {"int8": ""}, "4 bits only"),
        (False, {"nf4": "", "int8": ""}, "no"),
        (False, {"quantised": ""}, "no"),
        (True, {}, "no"),
    ],
)
def test_the_page_on_methods_tells_4_bits_from_8(
    trains: bool, refuses: dict[str, str], says: str
) -> None:
    """Closed form."""
    method = type("Made", (Method,), {"trains_weights": trains, "refuses": refuses})
    assert methods_page._over_few_bits(method) == says


def test_each_paper_is_named_by_its_authors_and_year() -> None:
    """Behaviour: of every method that has one."""
    cited = [p for n in registry.names("method") if (p := methods_page._paper(n)) != "none"]
    assert len(cited) >= 40
    for paper in cited:
        assert re.match(r"\[[A-Z][\w\- .]+ \d{4}\]\(https://", paper), paper


def test_every_freezing_is_measured() -> None:
    """Behaviour: one that is new is not left out of the page."""
    measured = {choice["name"] for choice in freezing.HALF}
    assert measured == set(registry.names("freezing")) - {"none"} and len(measured) == 8


def test_every_method_was_measured() -> None:
    """Behaviour: `python -m benchmarks.methods` measures those that are missing here."""
    records = methods.records()
    assert sorted(records) == registry.names("method")
    assert all(record["shape"] == methods.SHAPE for record in records.values())
    assert all("measured" in record for record in records.values())


@pytest.mark.parametrize(("name", "record"), methods.records().items())
def test_a_record_is_of_the_settings_that_a_recipe_has(
    name: str, record: dict[str, Any], tmp_path: Path
) -> None:
    """Reference: the recipe as it would be measured now."""
    assert methods.recipe(tmp_path, name).resolved()["method"] == record["settings"]


@pytest.mark.parametrize("name", sampled(registry.names("method"), every=16))
def test_a_record_is_what_is_measured_now(name: str, in_folder: Path) -> None:
    """Reference: the record, by the same run and the same plan again, to the byte."""
    there = methods.records()[name]
    assert methods.measured_now([name])[name] | {"environment": there["environment"]} == there


@pytest.mark.parametrize(("name", "record"), methods.records().items())
def test_what_a_method_keeps_is_what_the_planner_says(name: str, record: dict[str, Any]) -> None:
    """Reference: live bytes of the run; each within 1 %."""
    for figure in methods.FIGURES:
        measured, planned = record["measured"][figure], record["planned"][figure]
        assert abs(planned - measured) <= 0.01 * measured, figure
