"""Epochs of CoLA on MiniLM, its lower four blocks frozen: their outputs kept on disk, and not.

    python -m benchmarks.prefix_cache [--only CASE] [--epochs 4] [--rows N] [--threads 1]

Both are sessions of one process and take turns, an update each, on the same rows: what else the
machine does slows both. Ratios are those of the medians over the epochs after the first, which
makes the file: of wall-clock time, and of the process's time on the processor. Writes
`benchmarks/records/prefix_cache.json` and the table in docs/frozen_prefix_cache.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import page
from benchmarks.peers.trainer import Lowres
from lowres.core.reading import load_recipe
from lowres.run import environment

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "records" / "prefix_cache.json"
PAGE = ROOT / "docs" / "frozen_prefix_cache.md"
FROZEN = 4
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "lora": ("lora", {}),
    "bitfit": ("bitfit", {}),
    # In the lowest trained block back-propagation ends at the adapter, above the feed-forward part.
    "pfeiffer": ("lora", {"method": "pfeiffer"}),
    "bitfit, mezo": (
        "bitfit",
        {"optimizer": {"name": "mezo", "lr": 1e-6}, "loop.max_grad_norm": None},
    ),
}
"""Recipe under recipes/cola, and what is changed in it."""


def recipe(case: str, levers: list[str], rows: int, epochs: int) -> Any:
    """The case's recipe in float32, without dropout, with frozen blocks."""
    name, changes = CASES[case]
    told = [
        f"freezing={{name: prefix, frozen: {FROZEN}}}", "model.dropout=0.0", "loop.precision='no'",
        f"levers={json.dumps(levers)}", f"task.train_examples={rows}", f"loop.epochs={epochs}",
        "loop.save_every=null", *(f"{k}={json.dumps(v)}" for k, v in changes.items()),
    ]  # fmt: skip
    return load_recipe(ROOT / "recipes" / "cola" / f"minilm-{name}-cpu.yaml", told)


def one(case: str, rows: int, epochs: int, folder: Path) -> dict[str, Any]:
    """The case's row."""
    sides = {"without": [], "with": ["frozen_prefix_cache"]}
    for side in sides:
        (folder / side).mkdir()
    runs = {side: Lowres(recipe(case, levers, rows, epochs), folder / side)
            for side, levers in sides.items()}  # fmt: skip
    streams = {side: run.session.updates() for side, run in runs.items()}
    wall: dict[str, list[float]] = {side: [] for side in runs}
    processor: dict[str, list[float]] = {side: [] for side in runs}
    whole = runs["with"].session.total
    for epoch in range(epochs):
        for side in runs:
            wall[side].append(0.0)
            processor[side].append(0.0)
        for _ in range(whole * epoch // epochs, whole * (epoch + 1) // epochs):
            for side, run in runs.items():
                before = time.perf_counter(), time.process_time()
                run.session.update(*next(streams[side]))
                wall[side][-1] += time.perf_counter() - before[0]
                processor[side][-1] += time.process_time() - before[1]
        print(case, {side: round(found[-1], 1) for side, found in wall.items()}, flush=True)
    losses = {side: run.session.progress.losses for side, run in runs.items()}
    pairs = list(zip(losses["without"], losses["with"], strict=True))
    return {
        "wall_seconds": wall, "processor_seconds": processor, "n": epochs - 1,
        "wall": ratio_of(wall), "processor": ratio_of(processor),
        "updates": len(pairs), "rows": rows,
        "largest_relative_difference_of_a_loss": max(abs(a - b) / abs(a) for a, b in pairs),
        "events": [e.text.replace(str(folder), "") for e in runs["with"].session.progress.events],
        "file_bytes": sum(p.stat().st_size for p in folder.rglob("*.safetensors")),
    }  # fmt: skip


def ratio_of(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """How many times faster the epochs after the first are: by medians, and of each pair."""
    later = {side: found[1:] for side, found in seconds.items()}
    pairs = sorted(a / b for a, b in zip(later["without"], later["with"], strict=True))
    medians = {side: statistics.median(found) for side, found in later.items()}
    return {"ratio": medians["without"] / medians["with"], "pairs": pairs, "medians": medians}


def table(record: dict[str, Any]) -> str:
    """The Markdown table, in the order of the cases."""
    rows = [
        "| method | epoch without | epoch with | times faster (each pair) | in wall-clock time "
        "| largest difference of a loss |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for case in CASES:
        row = record["cases"][case]
        medians = row["processor"]["medians"]
        faster = [
            f"{row[clock]['ratio']:.2f} ({min(row[clock]['pairs']):.2f} to "
            f"{max(row[clock]['pairs']):.2f})"
            for clock in ("processor", "wall")
        ]
        rows.append(
            f"| {case} | {medians['without']:.1f} s | {medians['with']:.1f} s "
            f"| {' | '.join(faster)} | {row['largest_relative_difference_of_a_loss']:.1e} |"
        )
    return "\n".join(rows)


def text() -> str:
    """The page with the record's table."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    return page.put(PAGE.read_text(encoding="utf-8"), "frozen_prefix_cache", table(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", choices=["", *CASES])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8551)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    record: dict[str, Any] = {"cases": {}}
    if RECORD.exists():
        record = json.loads(RECORD.read_text(encoding="utf-8"))
    for case in CASES:
        if arguments.only not in ("", case):
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LOWRES_CACHE"] = folder
            row = one(case, arguments.rows, arguments.epochs, Path(folder))
        row["environment"] = environment.describe(torch.device("cpu"), 1)
        record["cases"][case] = row
        print(
            case,
            row["wall"]["ratio"],
            row["processor"]["ratio"],
            row["largest_relative_difference_of_a_loss"],
        )
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
