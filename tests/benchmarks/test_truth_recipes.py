"""The recipes that plans are compared with real runs of."""

from __future__ import annotations

from pathlib import Path

from benchmarks.planner.truth import RECORDS
from benchmarks.planner.truth_recipes import measurable, recipes
from lowres.core import registry
from lowres.core.errors import InputError
from lowres.core.reading import load_recipe
from lowres.core.record import from_file


def test_every_lever_and_optimizer_is_accepted_somewhere(tmp_path: Path) -> None:
    """Behaviour: names are unique; what is refused everywhere would not be compared at all."""
    made = list(recipes(tmp_path))
    assert len({name for name, _ in made}) == len(made) > 300
    levers, optimizers, kinds = set(), set(), set()
    for name, raw in made:
        try:
            load_recipe(raw)
        except InputError:
            continue
        levers |= {lever["name"] for lever in raw["levers"]}
        optimizers.add(raw["optimizer"]["name"])
        kinds.add(name.partition("-")[0])
    assert levers == set(measurable()) < set(registry.names("lever"))
    assert optimizers == set(registry.names("optimizer"))
    assert kinds == {"decoder", "encoder", "seq2seq"}


def test_records_hold_a_plan_whose_peak_is_the_measured_one() -> None:
    """Reference: the committed runs; equal to the byte, and they name no place of a machine."""
    files = sorted(RECORDS.glob("*.json"))
    assert len(files) >= 284
    for file in files:
        record = from_file(file)
        assert record.outcome == "ok" and record.plan is not None, file.name
        phases = record.measured.phases
        planned = max(record.plan["phases"][p]["live_bytes"] for p in phases)
        assert planned == max(m.live_bytes or 0 for m in phases.values()), file.name
        assert '"/' not in file.read_text(encoding="utf-8"), file.name
