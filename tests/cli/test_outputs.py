"""Where commands write: the place is looked at before the work, and files of others stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import ROOT

FIT = ("fit", "--model", "package:lowres/assets/tiny_lm", "--device-gib", "1")
PLAN = ("plan", str(ROOT / "recipes" / "quickstart.yaml"))
MATRIX = ("plan", "--model", "a", "--model", "b", "--gpu", "t4")
OURS = "# tiny on gsm8k for t4, chosen by `lowres fit`.\nschema: 1\n"


def no_work(*words: Any, **names: Any) -> Any:
    raise AssertionError("the work began before the place was looked at")


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch, in_folder: Path) -> Path:
    """A folder with a user's file, where nothing is searched for, planned or read."""
    for name in (
        "recommend.fit.fit",
        "planning.plan.plan",
        "planning.matrix.matrix",
        "core.record.from_file",
    ):
        monkeypatch.setattr(f"lowres.{name}", no_work)
    (in_folder / "mine.yaml").write_text("schema: 1\n")
    (in_folder / "folder.html").mkdir()
    return in_folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*FIT, "--output", "mine.yaml"), "not by `lowres fit`"),
        ((*FIT, "--output", "mine.yaml/x/fit.yaml"), "'mine.yaml' is no folder"),
        ((*FIT, "--html", "nowhere/x.html"), "there is no folder 'nowhere'"),
        ((*FIT, "--html", "mine.yaml"), "let it end in .html"),
        ((*PLAN, "--html", "nowhere/x.html"), "there is no folder 'nowhere'"),
        ((*PLAN, "--html", "folder.html"), "it is a folder"),
        ((*MATRIX, "--html", "nowhere/x.html"), "there is no folder 'nowhere'"),
        (("report", "mine.yaml", "--html", "nowhere/x.html"), "there is no folder 'nowhere'"),
        (("schema", "--output", "nowhere/x.json"), "there is no folder 'nowhere'"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    words: tuple[str, ...], said: str, command: Callable[..., Any], idle: Path
) -> None:
    """Behaviour: exit 2, no traceback, the user's file as it was."""
    done = command(*words)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert (idle / "mine.yaml").read_text() == "schema: 1\n"
    assert not (idle / "nowhere").exists()


def test_a_file_that_fit_wrote_is_replaced(
    command: Callable[..., Any], in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: and folders on the way to a new one are made."""
    found = SimpleNamespace(recipe=OURS + "# anew\n")
    monkeypatch.setattr("lowres.recommend.fit.fit", lambda *words, **names: found)
    monkeypatch.setattr("lowres.report.plan_table.print_fit", lambda found: None)
    (in_folder / "fit.yaml").write_text(OURS)
    for name in ("fit.yaml", "a/b/fit.yaml"):
        done = command(*FIT, "--output", name)
        assert done.returncode == 0, done.stderr
        assert (in_folder / name).read_text() == found.recipe
