"""`lowres report`. All tests check behaviour: exit codes, and what is printed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lowres.core.record import (
    Measurement,
    PhaseMemory,
    RunRecord,
    Score,
    StepTime,
    from_file,
    to_json,
)


def write(path: Path, name: str, error: str | None = None) -> Path:
    record = RunRecord(
        id=name, outcome="failed" if error else "ok", started="2026-11-20T12:00:00+00:00",
        seconds=1.0, recipe={"method": {"name": "lora"}, "task": {"name": "cola"}},
        digest="0" * 16, overrides=[], task_version=1,
        environment={}, error=error, losses=[0.7, 0.6],
        measured=Measurement(phases={"load": PhaseMemory(live_bytes=2**20)}),
        scores=[Score("in_domain", "matthews", 0.5, 0.01, 100, 0.0, 2)],
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(record), encoding="utf-8")
    return path


@pytest.fixture
def report(command):
    """Calls `lowres report ...` in this process; gives exit code, output and error output."""

    def call(*arguments: object) -> tuple[int, str, str]:
        done = command("report", *arguments)
        return done.returncode, done.stdout, done.stderr

    return call


def test_a_run_folder_shows_its_one_record(report, tmp_path: Path) -> None:
    """Behaviour: other JSON in the run folder, the model's configuration for one, is left alone."""
    write(tmp_path / "run" / "record.json", "one")
    write(tmp_path / "run" / "older" / "record.json", "other")
    code, out, _ = report(tmp_path / "run")
    assert code == 0
    assert "one: ok" in out and "0.5000" in out and "other" not in out


def test_a_folder_of_runs_is_compared_in_order(report, tmp_path: Path) -> None:
    """Behaviour: records at any depth and of any name; JSON that is no record is skipped."""
    write(tmp_path / "b" / "record.json", "run-b")
    write(tmp_path / "a" / "deep" / "record.json", "run-a", error="it broke on [rank] [/x]")
    write(tmp_path / "kept.json", "kept")
    (tmp_path / "b" / "config.json").write_text("{}")
    code, out, _ = report(tmp_path, tmp_path / "kept.json")
    assert code == 0
    assert out.index("run-a") < out.index("run-b") < out.index("kept")
    assert out.count("kept") == 1
    assert "1: failed: it broke on [rank] [/x]" in out
    assert "in_domain" in out and "0.5000 ± 0.0100" in out


def test_a_folder_without_records_ends_with_2_and_is_named(report, tmp_path: Path) -> None:
    """Behaviour: wrong input is exit code 2, with the folder in the message."""
    (tmp_path / "config.json").write_text("{}")
    code, _, err = report(tmp_path)
    assert code == 2
    assert str(tmp_path) in err and "holds no run record" in err


def test_a_broken_record_below_a_folder_ends_with_2_and_is_named(report, tmp_path: Path) -> None:
    """Behaviour: by its name it is a record, so it is not passed over as other JSON is."""
    write(tmp_path / "a" / "record.json", "run-a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "record.json").write_text("{}")
    code, _, err = report(tmp_path)
    assert code == 2 and str(tmp_path / "b" / "record.json") in err


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_a_file_that_is_no_record_ends_with_2_and_is_named(report, tmp_path: Path, content) -> None:
    """Behaviour: a named file is never skipped."""
    file = tmp_path / "record.json"
    if content is not None:
        file.write_text(content)
    code, _, err = report(file)
    assert code == 2
    assert str(file) in err


def test_json_output_is_the_records_and_the_page_is_written_beside(report, tmp_path: Path) -> None:
    """Behaviour: standard output stays parseable when a page is asked for as well."""
    files = [write(tmp_path / f"{n}.json", n) for n in ("x", "y")]
    code, out, err = report(*files, "--json", "--html", tmp_path / "page.html")
    assert code == 0
    assert [r["id"] for r in json.loads(out)] == ["x", "y"]
    assert "page.html" in err
    assert str(tmp_path) not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_page_is_never_written_over_a_record(report, tmp_path: Path) -> None:
    """Behaviour: `--html record.json` is a slip that must not cost the record."""
    file = write(tmp_path / "record.json", "one")
    before = file.read_bytes()
    code, _, err = report(file, "--html", file)
    assert code == 2 and ".html" in err
    assert file.read_bytes() == before


def test_figures_that_are_no_numbers_are_read_back(report, tmp_path: Path) -> None:
    """Behaviour: a run that diverged at its end scored so; it is shown, and so are the others."""
    file = write(tmp_path / "a" / "record.json", "wild")
    record = from_file(file)
    record.scores[0].value, record.scores[0].stderr = math.nan, math.inf
    record.measured.step_time = StepTime(1, math.nan, math.nan, math.nan, math.inf)
    file.write_text(to_json(record), encoding="utf-8")
    again = from_file(file)
    assert math.isnan(again.scores[0].value) and again.scores[0].stderr == math.inf
    assert again.measured.step_time is not None
    assert again.measured.step_time.tokens_per_second == math.inf
    write(tmp_path / "b" / "record.json", "tame")
    code, out, _ = report(tmp_path)
    assert code == 0 and "wild" in out and "tame" in out
