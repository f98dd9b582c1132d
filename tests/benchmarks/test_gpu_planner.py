"""The planner's GPU suite on a CPU: its command, its list, its random weights, its replay."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import measure, part, planner, recipes, snapshots, summary, tiny, weights
from benchmarks.gpu.boundaries import search
from lowres.bridges import transformers as bridge
from lowres.core.learner import LoadRequest
from lowres.core.record import from_file
from lowres.core.units import MIB
from lowres.memory import device as devices

PHASES = {"load", "first_step", "steady_steps", "save", "evaluate"}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of three tiny recipes."""
    folder = tmp_path_factory.mktemp("records")
    assert planner.main(["--tiny", "--only", "decoder-lora", "--records", str(folder)]) == 0
    return folder


def test_each_recipe_leaves_a_record_with_plan_and_measurement(done: Path) -> None:
    """Behaviour: phases, step times, a plan that names no place; every planned peak is exact."""
    files = sorted(done.glob("*.json"), key=lambda f: f.stem)
    assert [f.stem for f in files] == [
        "decoder-lora", "decoder-lora-checkpointing", "decoder-lora-nf4",
    ]  # fmt: skip
    for file in files:
        record = from_file(file)
        assert record.outcome == "ok" and record.recipe["model"]["checkpoint"] == "decoder"
        assert set(record.measured.phases) == PHASES
        assert record.measured.step_time is not None and record.measured.step_time.n == 5
        assert len(record.losses) == recipes.STEPS
        assert record.environment["versions"]["torch"] and "commit" in record.environment
        assert record.plan is not None and "curve" not in record.plan
        assert "/" not in json.dumps([record.plan["shapes"], record.recipe])
        raw = json.loads(file.read_text())
        assert summary.peak_error(raw) == 0
        assert raw["suite"]["reached"] == "resume" and raw["suite"]["resume"]["live_bytes"] > 0
    assert not list(done.glob("*.tried")) and not list(done.glob("*.partial"))


def test_a_second_call_runs_nothing(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: records that are there are kept."""
    before = {f.name: f.stat().st_mtime_ns for f in done.iterdir()}
    monkeypatch.delattr(part.Part, "_start")
    assert planner.main(["--tiny", "--only", "decoder-lora", "--records", str(done)]) == 0
    assert "0 run, 0 skipped, 0 left" in capsys.readouterr().out
    assert {f.name: f.stat().st_mtime_ns for f in done.iterdir()} == before


def test_the_summary_is_a_markdown_table(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: a row for all, one for each way to train."""
    assert planner.main(["--summary", "--records", str(done)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[2].startswith("| all | 3 of 3 | 0.00% | 0.00% | +0.00% | 0 of 3 | - | - |")
    assert [row.split("|")[1].strip() for row in rows[3:]] == [
        "lora", "lora+gradient_checkpointing", "lora+nf4_weights",
    ]  # fmt: skip


def _record(outcome: str, fits: bool, planned: int, measured: int, cap: int = 8) -> dict[str, Any]:
    return {
        "outcome": outcome, "id": "x", "error": None, "suite": {},
        "recipe": {"method": {"name": "lora"}, "levers": [], "budget": {"device_gib": cap}},
        "plan": {"fits": fits, "step": {"seconds": 2.0}, "card": {"context_bytes": 500 * MIB},
                 "phases": {"steady_steps": {"allocated_bytes": planned, "live_bytes": 1}}},
        "measured": {
            "step_time": {"p50_seconds": 3.0},
            "phases": {"steady_steps": {"allocated_bytes": measured, "live_bytes": 1,
                                        "process_bytes": 700 * MIB, "reserved_bytes": 100 * MIB}},
        },
    }  # fmt: skip


def test_the_summary_counts_what_the_planner_got_wrong() -> None:
    """Against a hand count: errors of runs to the end, decisions of all, by budget."""
    records = [
        _record("ok", True, 98, 100), _record("ok", True, 101, 100), _record("ok", False, 110, 100),
        _record("oom", True, 100, 70), _record("oom", False, 100, 70, cap=12),
    ]  # fmt: skip
    lines = summary.table(records).splitlines()
    assert lines[2] == (
        "| all | 3 of 5 | 2.00% | 10.00% | +10.00% | 1 of 3 | 1 of 3 (33.3%) | 1 of 2 (50.0%) | "
        "1.50 / 1.50 / 1.50 |"
    )
    assert lines[4].startswith("| 12 GiB | 0 of 1 | - | - | - | - | - | 0 of 1 (0.0%) |")
    assert [line.split("|")[1].strip() for line in lines[3:]] == ["8 GiB", "12 GiB", "lora"]
    (text, _) = summary._contexts(records)
    assert "3 runs" in text and "median 600.0 MiB; planned 500.0 MiB" in text


def test_the_list_for_a_gpu_is_long_varied_and_valid() -> None:
    """Behaviour: every recipe loads; every boundary has two sides."""
    every = recipes.cases()
    assert len({case.name for case in every}) == len(every) >= 150
    loaded = [case.recipe() for case in every]
    assert len({recipe.model.checkpoint for recipe in loaded}) == len(recipes.SHAPES) == 13
    assert {recipe.budget.device_gib for recipe in loaded} == {8, 12, 16, 24}
    assert {recipe.method.name for recipe in loaded} == {"full", "lora", "bitfit"}
    levers = {lever.name for recipe in loaded for lever in recipe.levers}
    assert levers == {"gradient_checkpointing", "nf4_weights", "int8_weights"}
    for case, recipe in zip(every, loaded, strict=True):
        assert (recipe.model.init == "pretrained") == case.stored
        assert recipe.loop.max_length <= case.longest
    below = {case.boundary for case in every if case.side == "below"}
    assert below == {case.boundary for case in every if case.side == "above"}
    assert len(below) >= 20
    assert sorted({c.model for c in every if c.traced}) == sorted(recipes.SHAPES)


def test_without_a_cuda_device_it_says_so_and_ends_with_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: one line, nothing run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert planner.main([]) == 2
    told = capsys.readouterr()
    assert not told.out and len(told.err.splitlines()) == 1


def test_the_search_ends_at_the_last_length_that_fits() -> None:
    """Against the definition, for every possible boundary."""
    for last in range(64, 512, 32):
        assert search(lambda length, last=last: length <= last, 64, 512, 32) == last
    assert search(lambda length: True, 64, 512, 32) is None
    assert search(lambda length: False, 64, 512, 32) is None


def small_part(folder: Path, minutes: float = 1) -> part.Part:
    return part.Part(
        tiny=True, records=folder / "records", configs=folder / "configs", scratch=folder,
        minutes=minutes, workers=1,
    )  # fmt: skip


def test_a_recipe_that_fails_is_recorded_with_what_it_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behaviour: tried once. Its process knows no recipe of that name."""
    tiny.write_configs(tmp_path / "configs")
    one = small_part(tmp_path)
    case = dataclasses.replace(tiny.cases()[0], name="unknown")
    one.run([case])
    assert capsys.readouterr().out.count("unknown: died: ") == 1
    record = from_file(tmp_path / "records" / "unknown.json")
    assert record.outcome == "failed" and "StopIteration" in (record.error or "")
    told = json.loads((tmp_path / "records" / "unknown.json").read_text())["suite"]["log"]
    assert told[0].startswith("Traceback") and str(tmp_path) not in "".join(told)
    one.run([case])
    assert not capsys.readouterr().out and not list((tmp_path / "records").glob("*.tried"))


def test_a_recipe_that_is_killed_twice_is_recorded_as_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: tried again once, as where memory of the host ran out meanwhile."""
    tiny.write_configs(tmp_path / "configs")
    one = small_part(tmp_path)
    killed = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **kept: start(killed, **kept))
    one.run(tiny.cases()[:1])
    assert capsys.readouterr().out.count(": died: ") == part.TRIES == 2
    record = from_file(tmp_path / "records" / f"{tiny.cases()[0].name}.json")
    assert record.outcome == "failed" and "ended with -9" in (record.error or "")


def test_where_nothing_can_be_run_the_exit_code_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behaviour: without configurations every recipe is skipped, and the first reason is told."""
    one = small_part(tmp_path)
    one.run(tiny.cases())
    assert one.say() == 1
    assert "there is no" in capsys.readouterr().err


def test_no_recipe_starts_that_would_end_too_late(tmp_path: Path) -> None:
    """Behaviour: it is named as left."""
    tiny.write_configs(tmp_path / "configs")
    one = small_part(tmp_path, minutes=0.05)
    one.run(tiny.cases())
    assert one.left == [case.name for case in tiny.cases()] and one.done == 0
    assert not list((tmp_path / "records").iterdir())


@pytest.mark.parametrize("model", ["decoder", "encoder", "seq2seq"])
def test_fresh_weights_are_those_of_the_bridge_but_for_their_values(
    model: str, tmp_path: Path
) -> None:
    """Against a reference: names, shapes, types, ties and buffers of `transformers.load_model`."""
    tiny.write_configs(tmp_path)
    head: Any = {"decoder": "causal", "encoder": "classification", "seq2seq": "seq2seq"}[model]
    request = LoadRequest(str(tmp_path / model), None, head, 2, "bfloat16", "sdpa", "random", False)
    config = lambda: bridge.load_config(request.checkpoint, None, False)
    mine, fresh = weights.fresh_model(request, config(), 0, 1)
    reference, names = bridge.load_model(request, config(), 0, 1)
    assert fresh == names and type(mine) is type(reference)

    def told(module: Any) -> dict[str, Any]:
        kinds = {n: (p.shape, p.dtype) for n, p in module.named_parameters()}
        return kinds | {n: b.tolist() for n, b in module.named_buffers()}

    assert told(mine) == told(reference)
    assert all(bool(p.isfinite().all()) for p in mine.parameters())
    assert not mine.training and mine.config.pad_token_id == reference.config.pad_token_id


@pytest.mark.parametrize(
    "model, head, missing",
    [("decoder", "causal", 0), ("encoder", "classification", 2), ("seq2seq", "seq2seq", 0)],
)
def test_a_written_checkpoint_loads_as_one_of_the_hub_would(
    model: str, head: Any, missing: int, tmp_path: Path
) -> None:
    """Behaviour: only a classification head is made anew; a second call writes nothing."""
    tiny.write_configs(tmp_path)
    folder = weights.checkpoint(tmp_path / model, tmp_path / "written")
    request = LoadRequest(str(folder), None, head, 2, "bfloat16", "sdpa", "pretrained", False)
    loaded, fresh = bridge.load_model(request, bridge.load_config(str(folder), None, False), 0, 1)
    assert len(fresh) == missing and all(name.startswith("classifier.") for name in fresh)
    assert all(bool((p == 1).all()) for n, p in loaded.named_parameters()
               if n.lower().endswith("norm.weight"))  # fmt: skip
    table = loaded.get_input_embeddings().weight.detach().float()  # type: ignore[operator]
    assert 0.015 < float(table.std()) < 0.025  # drawn with 0.02
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    weights.checkpoint(tmp_path / model, folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp


def _entry(action: str, size: int, address: int) -> dict[str, Any]:
    return {"action": action, "size": size, "addr": address, "stream": 0}


def test_events_of_the_allocator_replay_to_what_it_reserved(tmp_path: Path) -> None:
    """Against a trace by hand: one segment of the usual size, one of a block's own.

    4 MiB come from a segment of 20 MiB, 18 MiB have their own; the second 18 MiB take the first
    one's address, which must not be mistaken for the same tensor.
    """
    entries = [
        _entry("segment_alloc", 20 * MIB, 1000), _entry("alloc", 4 * MIB, 1000),
        _entry("segment_alloc", 18 * MIB, 9000), _entry("alloc", 18 * MIB, 9000),
        _entry("free_requested", 18 * MIB, 9000), _entry("free_completed", 18 * MIB, 9000),
        _entry("alloc", 18 * MIB, 9000), _entry("free_completed", 4 * MIB, 1000),
        _entry("free_completed", 7, 4242),
    ]  # fmt: skip
    trace = snapshots.to_trace(entries, None)
    assert trace["complete"] and not trace["expandable"] and len(trace["events"]) == 8
    snapshots.write_trace(tmp_path / "trace.json.gz", trace)
    assert snapshots.replay_snapshot(snapshots.read_trace(tmp_path / "trace.json.gz")) == (
        38 * MIB, 38 * MIB,
    )  # fmt: skip
    # The real one took a segment more than the simulation needs.
    more = snapshots.to_trace([*entries, _entry("segment_alloc", 2 * MIB, 50_000)], None)
    assert snapshots.replay_snapshot(more) == (38 * MIB, 40 * MIB)


def test_a_state_is_summed_up_by_segments_and_free_blocks() -> None:
    """Against a hand count."""
    blocks = [{"size": 6, "state": "active_allocated"}, {"size": 4, "state": "inactive"}]
    sizes = {"total_size": 10, "active_size": 6, "allocated_size": 6}
    large = {"segment_type": "large", "blocks": blocks, **sizes}
    small = {"segment_type": "small", "blocks": [{"size": 10, "state": "inactive"}],
             "total_size": 10, "active_size": 0, "allocated_size": 0}  # fmt: skip
    found = snapshots.summary({"segments": [large, small]}, 99)
    assert found["asked_bytes"] == 99 and found["reserved_bytes"] == 20
    assert found["active_bytes"] == 6 and found["largest_free_bytes"] == [10, 4]
    assert (found["large_segments"], found["small_reserved_bytes"], found["free_blocks"]) == (
        1, 10, 2,
    )  # fmt: skip


def test_step_times_leave_the_warm_up_out() -> None:
    """Against a closed form: percentiles of the five updates after it."""
    one = measure.Measuring(None, None, None, None, False, None)  # type: ignore[arg-type]
    one.seconds, one.tokens = [9.0, 1.0, 2.0, 3.0, 4.0, 5.0], [7.0] * 6
    found = one._step_time()
    assert found is not None and (found.n, found.p50_seconds) == (5, 3.0)
    assert found.p20_seconds == pytest.approx(1.8) and found.p80_seconds == pytest.approx(4.2)
    assert found.tokens_per_second == pytest.approx(35 / 15)


def test_running_out_of_memory_is_recorded_with_the_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: the phases before it stand in the record; random weights of this suite's own."""
    update = measure.Measuring._update

    def full(self: Any, learner: Any, engine: Any, accelerator: Any, step: int) -> float:
        if step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return update(self, learner, engine, accelerator, step)

    monkeypatch.setattr(measure.Measuring, "_update", full)
    monkeypatch.setattr(bridge, "load_model", weights.fresh_model)
    tiny.write_configs(tmp_path)
    (tmp_path / "records").mkdir()
    measure.run(
        measure.Job("decoder-full", True, str(tmp_path), str(tmp_path), str(tmp_path / "records"))
    )
    record = from_file(tmp_path / "records" / "decoder-full.json")
    assert (record.outcome, record.error) == ("oom", "CUDA out of memory.")
    assert [e.text for e in record.events] == ["in steady_steps"] and len(record.losses) == 1
    assert {"load", "first_step"} <= set(record.measured.phases)
    assert [p.name for p in tmp_path.iterdir() if p.name.isdigit()] == []


def test_an_imitated_card_is_told_to_torch_and_has_no_step_ratio(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Closed form: workspaces as planned before Hopper; Hopper's own are left as they are."""
    for name, asked in (("rtx-4060", ":4096:2:16:8"), ("h200", None)):
        monkeypatch.setattr(os, "environ", {})
        measure._imitate(devices.load(name))
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == asked
    assert (2 * 4096 + 8 * 16) * 1024 == devices.workspace_bytes((8, 9))
    record: Any = {"measured": {"step_time": {"p50_seconds": 3.0}},
                   "plan": {"step": {"seconds": 2.0}}, "suite": {"imitated": False}}  # fmt: skip
    assert summary.step_ratio(record) == 1.5
    record["suite"]["imitated"] = True
    assert summary.step_ratio(record) is None
