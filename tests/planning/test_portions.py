"""Which micro-batches of an update a plan looks at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lowres
from lowres.core.example import Batch, Row, real_tokens
from lowres.making import build
from lowres.making.data import Data, Order
from lowres.making.gradients import micro_batches
from lowres.memory import device as devices
from lowres.planning import plan, portions
from lowres.planning.assumed import assumed_inputs


def batch(*lengths: int) -> Batch:
    """Rows of so many tokens, padded to the longest."""
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return {"input_ids": mask.clone(), "attention_mask": mask, "labels": mask.clone()}


def test_the_first_the_largest_and_where_that_has_no_padding_the_largest_with_some() -> None:
    """Against hand-made updates."""
    assert portions.telling([batch(4, 4)]) == {0}
    assert portions.telling([batch(9, 9), batch(4, 4), batch(5, 5)]) == {0, 2}
    assert portions.telling([batch(4, 4), batch(4, 4), batch(4, 3)]) == {0, 2}
    assert portions.telling([batch(4, 4), batch(6, 6), batch(3, 2), batch(5, 1)]) == {0, 1, 3}
    assert portions.telling([batch(4, 3), batch(6, 6), batch(5, 5)]) == {0, 1}
    assert portions.telling([batch(4, 4), batch(6, 6), batch(6, 5), batch(6, 4)]) == {0, 2}
    packed = {"input_ids": torch.zeros(1, 9), "labels": torch.zeros(1, 9)}
    assert portions.telling([packed, packed]) == {0, 1}
    alone = packed | {"position_ids": torch.arange(9)[None]}
    together = packed | {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])}
    assert portions.telling([alone, alone, together]) == {0, 2}


def test_targets_decide_where_logits_are_made_for_them_alone() -> None:
    """Against a hand-made update: fewer tokens, and more of them asked for."""
    objective: Any = SimpleNamespace(targets=lambda b: int((b["labels"] == 1).sum()))
    few, many = batch(6, 6), batch(5, 5)
    few["labels"][:, 1:] = 0
    assert portions.telling([many, few, many]) == {0, 1}
    assert portions.telling([many, few, many], objective) == {0, 1, 2}
    assert portions.telling([many, many, few, batch(6, 6)], objective) == {0, 3}


def test_a_micro_batch_with_padding_among_full_ones_is_planned(
    recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Reference: a real run. The one row that is short asks for a mask, in an update whose other
    micro-batches are as large and have none."""
    for name, rows in (("train", 15), ("valid", 1)):
        full = [" ".join(["a"] * 31)] * rows
        (tmp_path / f"{name}.txt").write_text("\n\n\n".join([*full, "a"]))
    one = recipe(
        task={"name": "text", "files": [str(tmp_path / "train.txt")],
              "valid_files": [str(tmp_path / "valid.txt")]},
        objective="next_token",
        loop={"global_batch_size": 16, "micro_batch_size": 4, "steps": 2, "max_length": 32},
    )  # fmt: skip
    inputs = build.read(one)
    built = build.build(one)
    seen = []
    for step in range(2):
        rows = portions.rows_of(one, inputs.data, step)
        made = micro_batches(one, built.learner, rows, one.loop.micro_batch_size)
        seen += [real_tokens(b) < b["input_ids"].numel() for b in made[1:]]
    assert any(seen) and not all(seen), [row.length for row in inputs.data.train]
    record = lowres.run(one, output_folder=tmp_path / "out", quiet=True)
    assert record.plan is not None
    for phase in ("first_step", "steady_steps"):
        planned = record.plan["phases"][phase]["live_bytes"]
        assert planned == record.measured.phases[phase].live_bytes, phase


@pytest.mark.parametrize(
    "kind, levers, seed",
    [
        ("encoder_decoder", [], 1),
        ("decoder", ["chunked_logits"], 1),
        ("decoder", ["sequence_packing"], 3),
    ],
)
def test_updates_that_are_larger_in_something_than_those_with_the_longest_rows_are_planned(
    kind: str, levers: list[str], seed: int, recipe: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Reference: a real run, which measures them too. The longest questions have the shortest
    answers, and no update of them has the most tokens or targets."""
    for split in ("train", "test"):
        with (tmp_path / f"{split}.jsonl").open("w", encoding="utf-8") as table:
            for i in range(32):
                words, steps = (22, 0) if i < 2 else (1, 20) if i == 2 else (1 + i * 5 % 16, i % 3)
                row = {"question": "the " * words, "answer": f"{'a ' * steps}#### {i}"}
                table.write(json.dumps(row) + "\n")
    one = recipe(
        kind,
        task={"name": "gsm8k", "folder": str(tmp_path), "eval_examples": 2},
        objective={"name": "next_token", "max_new_tokens": 4},
        levers=levers,
        loop={"steps": 4, "max_length": 60, "seed": seed},
    )
    inputs = build.read(one)
    learner = build.build(one).learner
    found = portions.larger(one, inputs.data, learner.only_targets)
    first, larger, second = portions.updates_shown(one, inputs.data, [], found)
    assert (first.rows, second.rows) == (0, 1) and larger.rows > 1
    record = lowres.run(one, output_folder=tmp_path / "out", quiet=True)
    assert record.plan is not None and record.plan["updates"] == [0, 1, larger.rows]
    planned = record.plan["phases"]["steady_steps"]["live_bytes"]
    assert planned == record.measured.phases["steady_steps"].live_bytes
    monkeypatch.setattr(portions, "larger", lambda *given: [])
    assert plan.plan(one, devices.load("cpu")).phases["steady_steps"].live_bytes < planned


def test_assumed_rows_ask_for_a_mask(recipe: Callable[..., Any]) -> None:
    """Behaviour: one row of each micro-batch is a token shorter, in training and evaluation."""
    one = recipe(objective="label_words")
    data = assumed_inputs(one).data
    longest = max(row.length for row in data.train)
    assert sorted(row.length for row in data.train) == [longest - 1] * 2 + [longest] * 6
    taken = portions.rows_of(one, data, 1)
    assert [row.length for row in taken] == ([longest] * 3 + [longest - 1]) * 2
    (_, rows), = data.evaluation.values()  # fmt: skip
    assert sorted({row.length for row in rows}) == [longest - 1, longest]


def test_of_several_processes_the_share_of_the_main_one_is_looked_at(
    recipe: Callable[..., Any],
) -> None:
    """Closed form: update 2 has the longest row, of another process; of the main one's rows those
    of update 3 are longest."""
    one = recipe(loop={"steps": 4, "global_batch_size": 2, "micro_batch_size": 1})
    order = Order([1] * 8, 2, 4, one.loop.seed)
    lengths = {order.rows(u)[i]: n for u, pair in enumerate(
        [(1, 9), (1, 9), (2, 3), (5, 3)]) for i, n in enumerate(pair)}  # fmt: skip
    data = Data([Row("", {"input_ids": [1] * lengths[i]}, [1] * lengths[i]) for i in range(8)],
                [], {})  # fmt: skip
    assert portions.larger(one, data, only_targets=False) == []
    assert portions.larger(one, data, only_targets=False, processes=2) == [3]
    assert [row.length for row in portions.rows_of(one, data, 3, 2)] == [5]


@pytest.mark.parametrize("seed", [3, 5, 4], ids=["first turn", "second turn", "third turn"])
@pytest.mark.parametrize("period", [1, 2])
def test_where_blocks_rotate_the_lowest_period_trains_on_the_largest_rows(
    period: int, seed: int, recipe: Callable[..., Any]
) -> None:
    """Behaviour: and no block set is rehearsed twice running where each update has another one, for
    its states are dropped between."""
    rotating = {"name": "badam", "period": period, "seed": seed}
    loop = {"steps": 24, "global_batch_size": 2, "micro_batch_size": 2}
    one = recipe(freezing=rotating, objective="label_words", loop=loop)
    # The sixth update has a short row with the longest answer.
    rows = [Row("", {"input_ids": [1] * 31}, [1]) for _ in range(48)]
    rows[Order([1] * 48, 2, 24, one.loop.seed).rows(5)[0]] = Row("", {"input_ids": [1]}, [1] * 40)
    data = Data(rows, [], {})
    names = ["a", "b", "c"]
    freezing: Any = one.freezing
    lows = [min(map(names.index, freezing.active(names, turn))) for turn in range(24 // period)]
    larger = portions.larger(one, data, only_targets=False)
    assert larger == [5]
    shown = portions.updates_shown(one, data, names, larger)
    lowest = {u.rows for u in shown if lows[u.turn // period] == min(lows)}
    assert lowest >= {1, 5}
    assert all(u.turn < 24 and u.rows < 24 for u in shown)
    if period == 1:
        assert all(a.turn != b.turn for a, b in zip(shown, shown[1:], strict=False))


def test_rows_that_a_lever_replaces_are_counted(
    recipe: Callable[..., Any], in_folder: Path
) -> None:
    """Behaviour: the frozen prefix's cache hands on rows of its own."""
    one = recipe(
        freezing={"name": "prefix", "frozen": 1}, objective="label_words", method="lora",
        levers=["frozen_prefix_cache", "chunked_logits"],
    )  # fmt: skip
    assert plan.plan(one, devices.load("cpu")).updates == [0, 1]
