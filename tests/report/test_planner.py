"""The error distribution of plans over records."""

from __future__ import annotations

from lowres.core.record import Measurement, PhaseMemory, RunRecord
from lowres.report.planner import distribution, errors


def record(name: str, planned: int, measured: int, kind: str = "live") -> RunRecord:
    key = f"{kind}_bytes"
    return RunRecord(
        id=name, outcome="ok", started="", seconds=1.0, recipe={}, digest="", overrides=[],
        task_version=1, environment={"device": "cpu"},
        plan={"phases": {"load": {key: 10}, "steady_steps": {key: planned}}},
        measured=Measurement(
            phases={
                "load": PhaseMemory(**{key: 10}),
                "steady_steps": PhaseMemory(**{key: measured}),
            }
        ),
    )  # fmt: skip


def test_shares_are_signed_and_the_peak_is_over_phases() -> None:
    """Closed form: 90 planned and 100 measured is 10 % too little."""
    found = {e.phase: e for e in errors([record("a", 90, 100)])}
    assert round(found["peak"].share, 6) == -0.1
    assert found["load"].share == 0 and set(found) == {"load", "steady_steps", "peak"}


def test_a_row_counts_equal_ones_and_the_worst() -> None:
    """Closed form: three runs, of which two are equal to the byte."""
    rows = distribution(errors([record(str(i), p, 100) for i, p in enumerate((100, 100, 104))]))
    (peak,) = [row for row in rows if row[2] == "peak"]
    assert peak[3:] == ("3", "2 (67%)", "0.000%", "4.000%", "+4.000%", "0")


def test_records_without_a_plan_or_a_measurement_are_left_out() -> None:
    """Behaviour: nothing is made up for them."""
    bare = record("a", 90, 100)
    bare.plan = None
    assert errors([bare]) == []
