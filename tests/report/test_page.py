"""The HTML page of records. All tests check behaviour: what a reader must and must not find."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lowres.core.errors import InputError
from lowres.core.record import (
    DataReport,
    Event,
    Measurement,
    Parameters,
    PhaseMemory,
    RunRecord,
    Score,
    StepTime,
)
from lowres.core.units import GIB, MIB, format_bytes
from lowres.report.page import render, write_page
from lowres.report.plots import smoothed


def a_record(name: str = "cola-lora-1", **changes: object) -> RunRecord:
    phases = {
        phase: PhaseMemory(
            live_bytes=(i + 1) * 100 * MIB, resident_bytes=GIB + i * MIB, seconds=1.5
        )
        for i, phase in enumerate(("load", "first_step", "steady_steps", "save", "evaluate"))
    }
    scores = [
        Score(split, metric, 0.4 + step / 1000, 0.0123, 1043, 0.6913, step)
        for step in (30, 60)
        for split in ("in_domain", "out_of_domain")
        for metric in ("matthews", "accuracy")
    ]
    fields: dict[str, object] = {
        "id": name, "outcome": "ok", "started": "2026-11-20T12:00:00+00:00", "seconds": 75.0,
        "recipe": {
            "model": {"checkpoint": "some/model"}, "task": {"name": "cola"},
            "method": {"name": "lora"}, "freezing": {"name": "none"},
            "objective": {"name": "classification"},
            "optimizer": {"name": "adamw"}, "levers": [{"name": "chunked_logits"}],
        },
        "digest": "0123456789abcdef", "overrides": ["loop.seed=1"], "task_version": 1,
        "environment": {
            "versions": {"torch": "2.9.1", "lowres": None}, "device": "cpu", "commit": "c0ffee",
        },
        "measured": Measurement(
            phases=phases,  # type: ignore[arg-type]
            step_time=StepTime(50, 0.18, 0.2, 0.25, 1708.0),
            parameters=Parameters(74_498, 22_788_484),
            saved_bytes=1_020_015,
        ),
        "data": [DataReport("train", 8551, 3, 17, 96_854, 8551, 47)],
        "scores": scores,
        "losses": [0.7 * 0.99**i for i in range(60)],
        "events": [Event(7, "recovery", "goes on with micro-batch 4")],
    }  # fmt: skip
    return RunRecord(**fields | changes)  # type: ignore[arg-type]


class Page(HTMLParser):
    """Attributes, ids and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def values(self, *names: str) -> list[str]:
        return [value for name, value in self.attributes if name in names]


def three_records() -> list[RunRecord]:
    return [
        a_record("first"),
        a_record("second"),
        a_record("third", outcome="oom", error="full", scores=[]),
    ]


@pytest.mark.parametrize("records", [[a_record()], three_records()], ids=["one", "three"])
def test_a_page_asks_for_nothing_from_outside(records: list[RunRecord]) -> None:
    """Behaviour: every reference is to the page itself, and there is no script."""
    html = render(records)
    page = Page(html)
    references = page.values("src", "href", "xlink:href", "srcset", "action")
    assert references, "the page's own anchors are references, too"
    assert all(r.startswith(("#", "data:")) for r in references)
    assert all(u.startswith("#") for u in re.findall(r"url\(['\"]?([^)]*)", html))
    assert "script" not in page.tags and "@import" not in html
    assert page.open == [], "every element is closed"


def test_no_two_elements_of_a_page_share_an_id() -> None:
    """Behaviour: figures would otherwise borrow each other's clip paths and markers."""
    ids = Page(render(three_records())).values("id")
    assert len(ids) > 10
    assert len(ids) == len(set(ids))


def test_a_page_shows_every_final_score_and_every_phase() -> None:
    """Behaviour: scores of the last step with baselines, and each phase's bytes by name."""
    record = a_record()
    text = Page(render([record])).text
    for s in record.final_scores():
        assert f"{s.split} {s.metric} {s.value:.4f} ± {s.stderr:.4f} {s.majority:.4f} {s.n}" in text
    assert len(record.measured.phases) == 5
    for phase, memory in record.measured.phases.items():
        assert f"{phase.replace('_', ' ')} - {format_bytes(memory.live_bytes)} - - -" in text
        assert format_bytes(memory.resident_bytes) in text
    for words in ("live bytes", "allocated bytes", "reserved bytes", "resident bytes", "peak, GiB"):
        assert words in text


def test_a_page_tells_what_was_run_where_and_what_happened() -> None:
    """Behaviour: one look-up for each kind of thing that the record holds."""
    text = Page(render([a_record()])).text
    for words in (
        "some/model", "lora", "chunked_logits", "200.0 ms", "p20 180.0 ms, p80 250.0 ms", "1,708",
        "74.50 k", "of 22.79 M", "996 KiB",
        "train 8,551 3 17 96,854 8,551 47",
        "goes on with micro-batch 4", "c0ffee", "2.9.1", "name: cola", "loop.seed=1",
        "Made by lowres", "mean of 5",
    ):  # fmt: skip
        assert words in text, words


def test_what_was_not_measured_is_a_dash_and_nothing_says_none() -> None:
    """Behaviour: a record with nothing but its mandatory fields still makes a page."""
    empty = {name: [] for name in ("data", "scores", "losses", "events")}
    bare = a_record(recipe={}, environment={"commit": None}, measured=Measurement(), **empty)
    text = Page(render([bare])).text
    assert "None" not in text
    assert "commit -" in text
    assert "step time, p50 -" in text


def test_a_failed_record_shows_its_error_before_anything_else_of_it() -> None:
    """Behaviour: the error stands in an alert, above the figures."""
    failed = a_record(
        outcome="diverged", error="the loss of update 9 is nan", losses=[0.7, math.nan]
    )
    html = render([failed])
    assert 'role="alert"' in html
    assert html.index("the loss of update 9 is nan") < html.index('<dl class="facts">')
    assert 'role="alert"' not in render([a_record()])


def test_html_in_a_record_is_shown_as_text() -> None:
    """Behaviour: names, errors, recipe values and figure labels cannot add elements to the page."""
    attack = "<script>alert(1)</script>"
    score = [Score(attack, attack, 0.5, 0.1, 10, None, step) for step in (1, 2)]
    recipe = a_record().recipe | {"model": {"checkpoint": attack}, "task": {"name": attack}}
    html = render([a_record(attack, recipe=recipe, scores=score, error=attack), a_record()])
    assert attack not in html
    assert "script" not in Page(html).tags
    assert "&lt;script&gt;" in html


def test_several_records_are_compared_and_plotted_against_memory() -> None:
    """Behaviour: a row and a link for each record, and only runs that went well in the plot."""
    html = render(three_records())
    page = Page(html)
    assert [h for h in page.values("href") if h.startswith("#record-")] == [
        "#record-1",
        "#record-2",
        "#record-3",
    ]
    assert (
        "in_domain matthews out_of_domain matthews peak live bytes peak resident bytes" in page.text
    )
    assert (
        "1 first lora ok 0.4600 ± 0.0123 0.4600 ± 0.0123 500.0 MiB 1.00 GiB 200.0 ms 74.50 k"
        in page.text
    )
    assert "matthews on in_domain against peak of live bytes, 2 records" in html
    assert "against peak of live bytes" not in render([a_record(), three_records()[2]])


def test_equal_records_give_equal_pages() -> None:
    """Behaviour: a page that is kept in a repository changes only with its records."""
    assert render(three_records()) == render(three_records())


def test_only_pages_are_overwritten(tmp_path: Path) -> None:
    """Behaviour: a page is replaced; a path that is no page's, or cannot be written, is refused."""
    page = tmp_path / "page.html"
    page.write_text("old")
    write_page([a_record()], page)
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    with pytest.raises(InputError, match="end in .html"):
        write_page([a_record()], tmp_path / "record.json")
    with pytest.raises(InputError, match="cannot be written"):
        write_page([a_record()], tmp_path / "nowhere" / "page.html")


def test_the_smoothed_line_is_the_mean_of_finite_neighbours() -> None:
    """Closed form: a window of 3 by hand; exact, the sums are small integers."""
    assert smoothed([1.0, 2.0, 6.0, math.nan, 4.0], 3) == [1.5, 3.0, 4.0, 5.0, 4.0]
