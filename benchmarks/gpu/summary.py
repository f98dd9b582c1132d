"""The records of the suite in a table: how far plans were off, and what they got wrong."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.snapshots import read_trace, replay_snapshot
from lowres.core.units import format_bytes

HEADER = (
    "recipes", "ran to the end", "median error", "95th percentile", "worst", "too low in",
    "ran out of memory of those planned to fit", "ran of those planned not to fit",
    "step time, measured over planned: 5 % / median / 95 %",
)  # fmt: skip


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder, by name."""
    files = sorted(folder.glob("*.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    return [record for record in found if "suite" in record]


def report(folder: Path) -> str:
    """Everything that the records of a folder tell, as Markdown."""
    records = read(folder)
    if not records:
        return f"no records in {folder}"
    lines = [table(records), ""]
    lines += _contexts(records) + _resumes(records) + _failures(records)
    lines += _replays(sorted((folder / "traces").glob("*.json.gz")))
    return "\n".join(lines).rstrip()


def table(records: Sequence[dict[str, Any]]) -> str:
    """All recipes, then by budget, then by method and levers."""
    rows = [_row("all", records)]
    budgets = {r["recipe"]["budget"]["device_gib"] for r in records} - {None}
    for cap in sorted(budgets):
        same = [r for r in records if r["recipe"]["budget"]["device_gib"] == cap]
        rows.append(_row(f"{cap:g} GiB", same))
    for way in sorted(set(map(_way, records))):
        rows.append(_row(way, [r for r in records if _way(r) == way]))
    ruler = ["---"] + ["--:"] * (len(HEADER) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [HEADER, ruler, *rows])


def _way(record: dict[str, Any]) -> str:
    recipe = record["recipe"]
    return "+".join([recipe["method"]["name"], *(lever["name"] for lever in recipe["levers"])])


def _row(name: str, records: Sequence[dict[str, Any]]) -> list[str]:
    errors = [e for e in map(peak_error, records) if e is not None]
    sizes = sorted(map(abs, errors))
    decided = [r for r in records if r["outcome"] in ("ok", "oom") and r["plan"]
               and r["plan"]["fits"] is not None]  # fmt: skip
    fitting = [r["outcome"] == "oom" for r in decided if r["plan"]["fits"]]
    refused = [r["outcome"] == "ok" for r in decided if not r["plan"]["fits"]]
    ratios = sorted(ratio for ratio in map(step_ratio, records) if ratio is not None)
    return [
        name,
        f"{sum(r['outcome'] == 'ok' for r in records)} of {len(records)}",
        f"{statistics.median(sizes):.2%}" if sizes else "-",
        f"{percentile(sizes, 95):.2%}" if sizes else "-",
        f"{max(errors, key=abs):+.2%}" if sizes else "-",
        f"{sum(e < 0 for e in errors)} of {len(errors)}" if errors else "-",
        _share(fitting),
        _share(refused),
        " / ".join(f"{percentile(ratios, at):.2f}" for at in (5, 50, 95)) if ratios else "-",
    ]


def peak_error(record: dict[str, Any]) -> float | None:
    """Planned over measured peak less one, of a run to the end; positive: planned too much.

    Blocks in use where there is an allocator, live tensors on a CPU.
    """
    if record["outcome"] != "ok" or not record["plan"]:
        return None
    planned, measured = record["plan"]["phases"], record["measured"]["phases"]
    for key in ("allocated_bytes", "live_bytes"):
        both = [(planned[name][key], phase[key]) for name, phase in measured.items()
                if name in planned and planned[name][key] and phase[key]]  # fmt: skip
        if both:
            return max(p for p, _ in both) / max(m for _, m in both) - 1
    return None


def step_ratio(record: dict[str, Any]) -> float | None:
    """Measured over planned seconds of an update; None where another card was planned for."""
    step, planned = record["measured"]["step_time"], (record["plan"] or {}).get("step")
    if record.get("suite", {}).get("imitated"):
        return None
    return step["p50_seconds"] / planned["seconds"] if step and planned else None


def percentile(values: Sequence[float], at: float) -> float:
    """The nearest-rank percentile of sorted values: one of them, never something in between."""
    return values[max(0, math.ceil(at / 100 * len(values)) - 1)]


def _share(wrong: Sequence[bool]) -> str:
    return f"{sum(wrong)} of {len(wrong)} ({sum(wrong) / len(wrong):.1%})" if wrong else "-"


def _contexts(records: Iterable[dict[str, Any]]) -> list[str]:
    """What the driver charged beside the allocator's segments, and what was planned for it."""
    found, planned = [], 0
    for record in records:
        phase = record["measured"]["phases"].get("steady_steps")
        if record["outcome"] == "ok" and phase and phase["process_bytes"]:
            found.append(phase["process_bytes"] - phase["reserved_bytes"])
            planned = record["plan"]["card"]["context_bytes"] if record["plan"] else planned
    if not found:
        return []
    return [
        f"Context, {len(found)} runs: {format_bytes(min(found))} to {format_bytes(max(found))}, "
        f"median {format_bytes(statistics.median(found))}; planned {format_bytes(planned)}. "
        "Charged by the driver at the end of a phase, less the phase's peak of reserved memory.",
        "",
    ]


def _resumes(records: Iterable[dict[str, Any]]) -> list[str]:
    """States read back from the host: a phase that plans have and records have not."""
    errors = []
    for record in records:
        measured = (record["suite"].get("resume") or {}).get("allocated_bytes")
        if measured and record["plan"]:
            errors.append(record["plan"]["phases"]["resume"]["allocated_bytes"] / measured - 1)
    if not errors:
        return []
    sizes = sorted(map(abs, errors))
    told = f"median {statistics.median(sizes):.2%}, 95th percentile {percentile(sizes, 95):.2%}"
    return [f"Resuming, {len(errors)} runs: {told}, worst {max(errors, key=abs):+.2%}.", ""]


def _failures(records: Iterable[dict[str, Any]]) -> list[str]:
    lines = [f"- {r['id']}: {r['outcome']}: {r['error']}" for r in records
             if r["outcome"] not in ("ok", "oom")]  # fmt: skip
    return ["Neither ran nor ran out of memory:", *lines, ""] if lines else []


def _replays(paths: Sequence[Path]) -> list[str]:
    """The allocator's own events through the planner's allocator."""
    if not paths:
        return []
    lines = ["| recorded events | replayed peak, reserved | real peak | difference |",
             "| --- | --: | --: | --: |"]  # fmt: skip
    for path in paths:
        simulated, real = replay_snapshot(read_trace(path))
        share = f"{simulated / real - 1:+.2%}" if real else "-"
        name = path.name.removesuffix(".json.gz")
        lines.append(f"| {name} | {format_bytes(simulated)} | {format_bytes(real)} | {share} |")
    return [*lines, ""]
