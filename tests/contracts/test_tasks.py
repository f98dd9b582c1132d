"""What every task promises, without naming one."""

from __future__ import annotations

from typing import Any

import pytest

from lowres.core import paths, registry
from lowres.core.example import Prediction
from tests.conftest import ROOT, sample_part

TASKS = registry.names("task")


def make(name: str) -> Any:
    fields = sample_part("task", name)
    del fields["name"]
    return registry.load("task", name)(**fields)


def available(name: str) -> Any:
    """The task over local data; skipped, saying so, where its data is not on this machine."""
    from lowres.core.errors import InputError

    task = make(name)
    try:
        task.examples("train")
    except InputError as error:
        pytest.skip(f"no data under {paths.data_folder()}: {error.problems[0].text}")
    return task


def test_there_are_tasks() -> None:
    """Reference: the files of the folder."""
    files = (ROOT / "lowres" / "tasks").glob("[!_]*.py")
    assert TASKS and TASKS == sorted(file.stem for file in files)


@pytest.mark.parametrize("name", TASKS)
def test_reading_twice_gives_the_same_rows(name: str) -> None:
    """Behaviour: two objects, equal rows in equal order, ids unique within the task."""
    first, second = available(name), make(name)
    ids = []
    for split in first.splits():
        rows = first.examples(split)
        assert list(rows) == list(second.examples(split)) and rows
        ids += [e.id for e in rows]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", TASKS)
def test_the_overlap_of_splits_is_the_published_one(name: str) -> None:
    """Behaviour: no evaluation row is trained on, but for those that the member declares."""
    task = available(name)
    train = {(e.text, e.pair) for e in task.examples("train")}
    shared = sum(
        (e.text, e.pair) in train
        for split in task.splits()[1:]
        for e in {(e.text, e.pair): e for e in task.examples(split)}.values()
    )
    assert shared == task.published_overlap


@pytest.mark.parametrize("name", TASKS)
def test_gold_answers_score_one_and_the_majority_does_not(name: str) -> None:
    """Closed form: accuracy of the truth is 1; a constant cannot be."""
    task = available(name)
    if task.asks == "likelihood":
        pytest.skip("has no gold answer; its score is checked in closed form in its own test")
    train = task.examples("train")
    for split in task.splits():
        rows = task.examples(split)
        gold = [Prediction(e.label if task.asks == "label" else e.answer) for e in rows]
        scores = task.score(rows, gold)
        assert scores[task.metric].value == pytest.approx(1.0)
        constant = task.baseline(train, rows)
        assert task.score(rows, [constant] * len(rows))[task.metric].value < 0.9


@pytest.mark.parametrize("name", TASKS)
def test_labels_are_in_range(name: str) -> None:
    """Behaviour: every label of every split has a name, and every name occurs in training."""
    task = available(name)
    if task.asks != "label":
        pytest.skip("asks for no label")
    for split in task.splits():
        assert {e.label for e in task.examples(split)} <= set(range(len(task.labels)))
    assert {e.label for e in task.examples("train")} == set(range(len(task.labels)))
    assert len(task.label_words) == len(task.labels)
