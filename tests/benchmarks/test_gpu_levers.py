"""The levers' GPU suite on a CPU: its command, its list, what it compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import lever_recipes, lever_summary, levers, measure, part, tiny
from benchmarks.gpu.boundaries import foresee
from benchmarks.gpu.lever_recipes import LeverCase
from lowres.core import registry
from lowres.core.example import IGNORED
from lowres.core.paths import data_folder
from lowres.core.record import from_file
from lowres.memory import device as devices

NAME = "decoder-parity-lora-sequence_packing"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of one recipe and the plain one beside it."""
    folder = tmp_path_factory.mktemp("records")
    assert levers.main(["--tiny", "--only", NAME, "--records", str(folder)]) == 0
    return folder


def every(small: bool) -> list[LeverCase]:
    found = [c for c in lever_recipes.cases(small) if isinstance(c, LeverCase)]
    assert len(found) == len({c.name for c in found}) > 100
    return found


def test_a_record_holds_what_the_plain_recipe_beside_it_gave(done: Path) -> None:
    """Behaviour: one record, planned to the byte, its losses those of the plain recipe."""
    (file,) = done.glob("*")
    record, raw = from_file(file), json.loads(file.read_text())
    assert file.stem == NAME and record.outcome == "ok" and len(record.losses) == 2
    beside = raw["suite"]["beside"]
    assert beside["outcome"] == "ok" and beside["losses"] == pytest.approx(record.losses, rel=1e-5)
    assert beside["parity"]["holds"] is True and beside["parity"]["apart"] < 1e-5
    assert lever_summary.peak(raw["plan"]["phases"]) == lever_summary.peak(
        raw["measured"]["phases"]
    )
    assert "/" not in json.dumps([raw["plan"]["shapes"], raw["recipe"]])


def test_a_second_call_runs_nothing(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: a record with its other half is kept."""
    monkeypatch.delattr(part.Part, "_start")
    assert levers.main(["--tiny", "--only", NAME, "--records", str(done)]) == 0
    assert "0 run, 0 skipped, 0 left" in capsys.readouterr().out


def test_the_summary_is_a_markdown_table(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: parity stands in a table of its own."""
    assert levers.main(["--summary", "--records", str(done)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if NAME in line]
    assert row.startswith(f"| {NAME} | ") and row.endswith(" | 1e-04 | yes |")


def test_without_a_cuda_device_it_says_so_and_ends_with_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: one line, nothing run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert levers.main([]) == 2
    told = capsys.readouterr()
    assert not told.out and len(told.err.splitlines()) == 1


@pytest.mark.parametrize("small", [True, False])
def test_every_lever_and_optimizer_is_in_the_list(small: bool) -> None:
    """Behaviour: alone; exact levers also with a tolerance; no plain recipe has a lever."""
    found = every(small)
    alone = {c.raw["levers"][0]["name"] for c in found if c.group == "alone" and c.beside}
    assert alone == set(registry.names("lever"))
    chosen = {c.raw["optimizer"]["name"] for c in found if c.group == "optimizer" and c.beside}
    assert chosen == set(registry.names("optimizer"))
    exact = {n for n in registry.names("lever") if registry.load("lever", n).effect == "exact"}
    assert exact == {c.raw["levers"][0]["name"] for c in found if c.tolerance is not None}
    by_name = {c.name: c for c in found}
    for case in found:
        recipe = case.recipe()
        assert recipe.loop.max_length <= case.longest
        assert case.stored == (recipe.model.init == "pretrained")
        if case.beside is not None:
            plain = by_name[case.beside]
            assert not plain.raw["levers"] and plain.raw["budget"]["device_gib"] is None
            assert plain.raw["loop"] == case.raw["loop"] and plain.varied == case.varied


def test_the_list_for_a_gpu_has_the_targets_the_ladders_and_the_recipes() -> None:
    """Behaviour: caps of 4 to 24 GiB; every recipe of the large model; ladders are cumulative."""
    found = every(small=False)
    assert {c.card for c in found if c.group == "target"} == {None, "rtx-4060", 4.0, "rtx-3090"}
    caps = {c.raw["budget"]["device_gib"] for c in found} - {None}
    assert caps == {4, 8, 12, 16, 24}
    files = {f.stem for f in lever_recipes.FILES.glob("llama-3.1-8b-*.yaml")}
    assert {c.name for c in found if c.group == "recipe"} == {f"recipe-{name}" for name in files}
    for model in (lever_recipes.SMALL, lever_recipes.LARGE):
        for way in ("lora", "full"):
            rungs = [c for c in found if c.beside and c.group == "ladder" and c.model == model
                     and c.raw["method"]["name"] == way]  # fmt: skip
            assert len(rungs) == len(lever_recipes.CAPS[model, way]) >= 6
            for below, above in zip(rungs, rungs[1:], strict=False):
                lower, upper = below.raw["levers"], above.raw["levers"]
                assert upper[: len(lower)] == lower
                assert len(upper) > len(lower) or above.raw["optimizer"] != below.raw["optimizer"]


def test_varied_rows_have_four_lengths_and_labels_of_their_own_tokens(tmp_path: Path) -> None:
    """Behaviour: rows of one token over and over would not show one that sees another."""
    tiny.write_configs(tmp_path)
    case = next(c for c in every(small=True) if c.name == NAME)
    rows = foresee(case, tmp_path / "decoder", None, None).inputs.data.train
    assert {row.length for row in rows} == {8, 16, 24, 32}
    starts = [sum(row.length for row in rows[:at]) for at in range(len(rows))]
    assert [row.start for row in rows] == starts
    assert len({tuple(row.inputs["input_ids"]) for row in rows}) == len(rows)
    for row in rows:
        assert len(row.labels) == row.length
        pairs = zip(row.labels, row.inputs["input_ids"], strict=True)
        assert all(label in (IGNORED, token) for label, token in pairs)


def test_a_card_stands_for_the_machine_at_hand(tmp_path: Path) -> None:
    """Behaviour: planned for that card, not for the one given."""
    tiny.write_configs(tmp_path)
    (case,) = [c for c in every(small=False) if c.name.endswith("target-qlora-2048-4gib")]
    small = next(c for c in every(small=True) if c.name.endswith("target-qlora-2048-4gib"))
    changed = type(small)(**{**vars(small), "card": case.card})
    found = foresee(changed, tmp_path / "decoder", None, None)
    assert found.plan is not None and found.plan.card is not None
    assert found.plan.card.name == "4 GiB card" and found.plan.fits


TARGETS = [case for case in every(small=False) if case.card is not None]


def test_every_target_names_a_card() -> None:
    """Closed form: 4-bit LoRA in 8 GiB (2,048 and 3,000 tokens) and in 4 GiB, full in 24 GiB."""
    assert {c.name.partition("-target-")[2] for c in TARGETS} == {
        "qlora-2048-8gib", "qlora-3000-8gib", "qlora-3000-offload-8gib", "qlora-2048-4gib",
        "full-offload-2048-24gib", "full-lomo-2048-24gib",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", TARGETS, ids=lambda case: case.name)
def test_a_target_is_planned_to_fit_its_card(case: LeverCase) -> None:
    """Behaviour: at the full shape of 8B, on the card's own capacity, with nothing unknown."""
    found = foresee(case, data_folder() / "configs" / case.model, None, None).plan
    assert found is not None and found.card is not None
    assert found.fits and not found.unknown
    assert found.card.available_bytes + found.card.context_bytes <= 24 * 2**30


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [c for c in every(small=False) if c.group == "ladder" and c.raw["budget"]["device_gib"]],
    ids=lambda case: case.name,
)
def test_a_capped_rung_is_planned_to_fit_its_cap(case: LeverCase) -> None:
    """Behaviour: so that a run on a card proves the plan, and is not refused by it."""
    device = devices.load("h200")
    found = foresee(case, data_folder() / "configs" / case.model, device, None).plan
    assert found is not None and found.fits


def _record(name: str, **suite: Any) -> dict[str, Any]:
    return {
        "id": f"{name}-20260101T000000", "outcome": "ok", "error": None, "started": "now",
        "losses": [2.0, 1.0], "plan": None, "recipe": {}, "suite": suite,
        "measured": {
            "step_time": {"p50_seconds": 3.0},
            "phases": {"steady_steps": {"allocated_bytes": 1 << 30, "reserved_bytes": 2 << 30,
                                        "process_bytes": 3 << 30, "live_bytes": 1}},
        },
    }  # fmt: skip


def test_losses_are_compared_within_the_tolerance() -> None:
    """Against a hand count; a run that ended early proves nothing."""
    ours, plain = _record("a"), _record("b")
    assert "parity" not in lever_summary.beside(ours, plain, None)
    ours["losses"] = [2.0, 1.001]
    near, far = (lever_summary.beside(ours, plain, t)["parity"] for t in (0.01, 0.0001))
    assert near["holds"] is True and far["holds"] is False
    assert near["apart"] == pytest.approx(0.001)
    ours["losses"] = [2.0]
    assert lever_summary.beside(ours, plain, 0.01)["parity"]["holds"] is None


def test_a_row_tells_ratio_and_peaks() -> None:
    """Against a hand count."""
    record, plain = _record("name"), _record("plain")
    plain["measured"]["step_time"] = {"p50_seconds": 2.0}
    record["suite"] |= {
        "capacity_bytes": 8 << 30,
        "beside": lever_summary.beside(record, plain, None),
    }
    assert lever_summary._row(record) == [
        "name", "8.00 GiB", "ok", "-", "1.00 GiB", "1.00 GiB", "2.00 GiB", "3.00 GiB", "3.000 s",
        "x 1.50",
    ]  # fmt: skip


def test_halves_are_put_together_or_dropped(tmp_path: Path) -> None:
    """Behaviour: a record without its plain recipe, and the other way round, is made again."""
    case = next(c for c in every(small=True) if c.beside and c.group == "alone")
    both = [c for c in every(small=True) if c.name in (case.name, case.beside)]
    own, other = tmp_path / f"{case.name}.json", tmp_path / f"{case.beside}.json"
    for file in (own, other):
        file.write_text(json.dumps(_record(file.stem)))
        levers.unite(both, tmp_path, {})
        assert not list(tmp_path.iterdir())
    own.write_text(json.dumps(_record("own")))
    other.write_text(json.dumps(_record("plain")))
    levers.unite(both, tmp_path, {})
    assert [f.name for f in tmp_path.iterdir()] == [own.name]
    assert json.loads(own.read_text())["suite"]["beside"]["outcome"] == "ok"
    assert levers.order(both, tmp_path) == []
    own.write_text(json.dumps(_record("own")))
    levers.unite(both, tmp_path, {case.beside or "": "no room"})
    told = json.loads(own.read_text())["suite"]["beside"]
    assert told == {"outcome": "skipped", "error": "no room"}


def test_a_plain_recipe_stands_beside_all_of_its_shape(tmp_path: Path) -> None:
    """Behaviour: it is run once, before the first of them, and each record gets what it gave."""
    found = [c for c in every(small=True) if c.group == "ladder" and c.model == "decoder"]
    lora = [c for c in found if c.raw["method"]["name"] == "lora"]
    rungs = [c for c in lora if c.beside]
    ordered = levers.order(lora, tmp_path)
    assert [c.name for c in ordered] == [rungs[0].beside, *(c.name for c in rungs)]
    assert len(rungs) >= 6
    for name in (rungs[0].beside, rungs[0].name, rungs[3].name):
        (tmp_path / f"{name}.json").write_text(json.dumps(_record(name or "")))
    levers.unite(lora, tmp_path, {})
    left = {f.stem: json.loads(f.read_text())["suite"]["beside"] for f in tmp_path.iterdir()}
    assert set(left) == {rungs[0].name, rungs[3].name}
    assert left[rungs[0].name] == left[rungs[3].name]


def test_a_recipe_that_cannot_be_planned_is_run_without_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: the record says why there is none."""
    from benchmarks.gpu import boundaries
    from lowres.memory.tracer import TraceFailed

    def fails(*_: Any, **__: Any) -> None:
        raise TraceFailed("not planned")

    monkeypatch.setattr(boundaries, "plan", fails)
    tiny.write_configs(tmp_path)
    (tmp_path / "records").mkdir()
    name = "decoder-alone-full-optimizer_in_backward"
    places = (str(tmp_path), str(tmp_path), str(tmp_path / "records"))
    measure.run(measure.Job(name, True, *places, suite="levers"))
    record = from_file(tmp_path / "records" / f"{name}.json")
    assert record.outcome == "ok" and record.plan is None and len(record.losses) == 8
    assert [e.text for e in record.events] == ["no plan: not planned"]
