"""What each freezing saves, measured on the CPU beside its plan, with full fine-tuning.

    python -m benchmarks.freezing [--n 3]

Every freezing runs beside the run that freezes nothing, alternating; live bytes are exact and equal
in every repetition, the time of an update is a ratio of medians. Writes
`benchmarks/records/freezing.json` and the table in docs/freezing.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from benchmarks import page
from benchmarks.levers import ROOT, UPDATES, measured, of_updates, recipe
from lowres.core.reading import load_recipe
from lowres.core.units import format_bytes
from lowres.memory import device as devices
from lowres.planning.plan import plan
from lowres.run import environment

RECORD = ROOT / "benchmarks" / "records" / "freezing.json"
PAGE = ROOT / "docs" / "freezing.md"
HALF: tuple[dict[str, Any], ...] = (
    {"name": "prefix", "frozen": 3},
    {"name": "suffix", "frozen": 3},
    {"name": "every", "nth": 2},
    {"name": "gradient_norm", "trained": 3},
    {"name": "fisher", "trained": 3},
    {"name": "semantic"},
    {"name": "lisa", "at_once": 1, "period": 2},
    {"name": "badam", "period": 2},
)
"""Of six blocks; half of them where the number is a choice."""


def keys(freezing: dict[str, Any] | str) -> dict[str, Any]:
    whole = {"method": "full", "optimizer": {"name": "adamw", "lr": 1e-5}, "freezing": freezing}
    return recipe("", []) | whole


def one(freezing: dict[str, Any], n: int) -> dict[str, Any]:
    """A freezing's row."""
    cpu = devices.load("cpu")
    planned = of_updates(plan(load_recipe(keys(freezing)), cpu))
    runs = [(measured(keys("none")), measured(keys(freezing))) for _ in range(n)]
    before, after = runs[0][0][0], runs[0][1][0]
    assert all((a[0], b[0]) == (before, after) for a, b in runs), "live bytes differ between runs"
    ratios = sorted(b[1] / a[1] for a, b in runs)
    return {
        "freezing": freezing, "before": before, "after": after, "planned": planned,
        "ratio": statistics.median(ratios), "ratios": ratios, "n": n,
    }  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """The Markdown table."""
    rows = [
        "| freezing | nothing frozen | with it | saves | planned | time of an update |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in record["freezing"]:
        fields = ", ".join(f"{k} {v}" for k, v in row["freezing"].items() if k != "name")
        name = f"`{row['freezing']['name']}`" + (f", {fields}" if fields else "")
        rows.append(
            f"| {name} | {format_bytes(row['before'])} | {format_bytes(row['after'])} "
            f"| {format_bytes(row['before'] - row['after'])} | {format_bytes(row['planned'])} "
            f"| x {row['ratio']:.2f} ({row['ratios'][0]:.2f} to {row['ratios'][-1]:.2f}) |"
        )
    told, n = record["environment"], min(row["n"] for row in record["freezing"])
    return (
        f"On {told['device']}, torch {told['versions']['torch']}, {told['date']}; n of {n} "
        f"alternating runs, {UPDATES} updates each.\n\n" + "\n".join(rows)
    )


def text() -> str:
    """The page with the record's table."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    return page.put(PAGE.read_text(encoding="utf-8"), "freezing", table(record))


def main() -> None:
    from lowres.bench.compatibility import surroundings

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=3)
    n = parser.parse_args().n
    record: dict[str, Any] = {
        "environment": surroundings() | {"cpu": environment.processor()}, "freezing": []
    }  # fmt: skip
    for freezing in HALF:
        record["freezing"].append(one(freezing, n))
        print(record["freezing"][-1], flush=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
