"""Every small recipe of both GPU suites on a CPU: none is met for the first time on a GPU."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import measure, tiny
from benchmarks.gpu.jobs import Job, Suite, cases_of
from benchmarks.gpu.part import ROOT
from benchmarks.gpu.recipes import Case
from lowres.core.record import RunRecord, from_file
from lowres.run.measuring import PROBED_UPDATES, WARM_UP_UPDATES

ON_A_CPU = "and this run is on 'cpu'"
"""In the words of what is refused here and runs on a GPU."""
UPDATES = ("first_step", "steady_steps")


def _distinct() -> list[tuple[Suite, Case]]:
    """Names that stand for the same recipe over the same rows are run once."""
    found: dict[str, tuple[Suite, Case]] = {}
    suites: tuple[Suite, ...] = ("planner", "levers")
    for suite in suites:
        for case in cases_of(suite, small=True):
            same = json.dumps([case.raw, case.varied, case.stored, case.traced], sort_keys=True)
            found.setdefault(same, (suite, case))
    return list(found.values())


DISTINCT = _distinct()


def test_there_are_recipes_of_both_suites() -> None:
    """Behaviour: the listing is not empty."""
    assert {suite for suite, _ in DISTINCT} == {"planner", "levers"} and len(DISTINCT) > 90


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scratch folder, with configurations and records."""
    folder = tmp_path_factory.mktemp("gpu-cases")
    tiny.write_configs(folder / "configs")
    (folder / "records").mkdir()
    return folder


def _measured(suite: Suite, case: Case, home: Path) -> RunRecord:
    """What the job of the suite leaves; in a process of its own where a lever wants that."""
    places = (str(home / "configs"), str(home), str(home / "records"))
    job = Job(case.name, True, *places, suite=suite)
    if any(lever.whole_process for lever in case.recipe().levers):
        order = home / f"{case.name}.job"
        order.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu.measure", str(order)],
            cwd=ROOT, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        measure.run(job)
    return from_file(home / "records" / f"{case.name}.json")


@pytest.mark.slow
@pytest.mark.parametrize("suite, case", DISTINCT, ids=lambda x: getattr(x, "name", x))
def test_every_recipe_leaves_a_whole_record(suite: Suite, case: Case, home: Path) -> None:
    """Behaviour: peaks of all updates, planned and measured, and step times where there are updates
    enough; or the reason that holds on a CPU alone, and a plan."""
    record = _measured(suite, case, home)
    assert record.plan is not None, [event.text for event in record.events]
    planned = record.plan["phases"]
    assert all(planned[name]["live_bytes"] for name in UPDATES)
    if record.error is not None:
        assert ON_A_CPU in record.error, record.error
        return
    assert record.outcome == "ok"
    assert all(record.measured.phases[name].live_bytes for name in UPDATES)
    steps = record.recipe["loop"]["steps"]
    assert len(record.losses) == steps
    assert (record.measured.step_time is None) == (steps < PROBED_UPDATES + WARM_UP_UPDATES + 2)
