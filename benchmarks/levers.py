"""What each lever saves and costs, measured on the CPU beside the planner's ladder line.

    python -m benchmarks.levers [--only NAME] [--n 5]

Each lever is run at a shape where it matters, with and without it, alternating; live bytes are
exact and equal in every repetition, the time of an update is a ratio of medians. What divides is
run in two processes, of which the first is measured. Writes
`benchmarks/records/levers.json`, which `make pages` makes the table in docs/levers.md of.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import yaml

import lowres
from benchmarks import page
from lowres.core import registry
from lowres.core.compatibility import Table
from lowres.core.plan import MemoryPlan, PlanPhase
from lowres.core.reading import load_recipe
from lowres.core.record import RunRecord, from_file
from lowres.core.units import format_bytes
from lowres.memory import device as devices
from lowres.planning.ladder import ladder
from lowres.planning.plan import plan
from lowres.run import environment

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "records" / "levers.json"
PAGE = ROOT / "docs" / "levers.md"
UPDATES = 6
STEPS: tuple[PlanPhase, ...] = ("first_step", "steady_steps")

FULL: dict[str, Any] = {"method": "full", "optimizer": {"name": "adamw", "lr": 1e-5}}
UNEVEN: dict[str, Any] = {
    "task": {"name": "gsm8k", "train_examples": 64, "eval_examples": 2},
    "objective": {"name": "next_token", "max_new_tokens": 8},
    "loop": {"micro_batch_size": 4, "global_batch_size": 16, "max_length": 256},
}
SMALL: dict[str, Any] = {
    "levers": [{"name": "gradient_checkpointing"}],
    "loop": {"micro_batch_size": 1, "global_batch_size": 1, "max_length": 32},
}
WHERE: dict[str, dict[str, Any]] = {
    "chunked_logits": {"loop": {"max_length": 256}, "fields": {"chunk": 64}},
    "frozen_prefix_cache": {"freezing": {"name": "prefix", "frozen": 4}},
    "length_bucketing": UNEVEN,
    "optimizer_in_backward": FULL | SMALL,
    "optimizer_offload": FULL,
    "sequence_packing": UNEVEN,
    "zero": FULL | {"fields": {"offload_optimizer": "cpu"}},
    **{
        f"zero, stage {stage}, 2 processes": FULL | {
            "lever": "zero", "processes": 2, "loop": {"micro_batch_size": 2},
            # Buckets as small as the model.
            "fields": {"stage": stage, "offload_optimizer": "none", "bucket_elements": 100_000},
        }
        for stage in (1, 2, 3)
    },
}  # fmt: skip
"""What the recipe with and the one without share, where that is not the usual one; rows of a lever
that has several say which it is and in how many processes it runs."""
_OWN = ("fields", "lever", "levers", "loop", "processes")
ROWS = sorted({*registry.names("lever"), *WHERE})


def lever_of(row: str) -> str:
    """The lever that a row of the table is about."""
    return str(WHERE.get(row, {}).get("lever", row))


def processes_of(row: str) -> int:
    return int(WHERE.get(row, {}).get("processes", 1))


def recipe(name: str, levers: list[dict[str, Any]]) -> dict[str, Any]:
    """LoRA on every linear layer, full rows of text."""
    changes = WHERE.get(name, {})
    loop = {
        "steps": UPDATES, "micro_batch_size": 4, "global_batch_size": 4, "max_length": 128,
        "max_grad_norm": None,
    } | changes.get("loop", {})  # fmt: skip
    return {
        "model": {"checkpoint": "package:lowres/assets/tiny_lm"},
        "task": {
            "name": "text", "files": [str(ROOT / "docs" / "start.md")], "eval_examples": 1,
            "valid_files": [str(ROOT / "docs" / "adding.md")],
        },
        "method": {"name": "lora", "targets": "all-linear"},
        "objective": "next_token",
        "optimizer": {"name": "adamw", "lr": 1e-4},
        "levers": [*changes.get("levers", []), *levers],
        **{k: v for k, v in changes.items() if k not in _OWN},
        "loop": loop,
    }  # fmt: skip


def of_updates(planned: MemoryPlan) -> int:
    """Planned peak of live bytes over the updates."""
    return max(planned.phases[p].live_bytes for p in STEPS)


def runs_of(name: str, raws: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """What is measured of recipes, one after the other; each in a process of its own where the
    lever changes its process for good."""
    processes = processes_of(name)
    if processes > 1:
        return [launched(raw, processes) for raw in raws]
    lever: Any = registry.load("lever", name)
    if not lever.whole_process:
        return [measured(raw) for raw in raws]
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as pool:
        return list(pool.map(measured, raws))


def measured(raw: dict[str, Any]) -> tuple[int, float]:
    """Peak of live bytes over the updates, and the median seconds of an update."""
    with tempfile.TemporaryDirectory() as folder:
        record = lowres.run(
            load_recipe(raw), output_folder=Path(folder) / "run", quiet=True, force=True
        )
    return figures(record)


def launched(raw: dict[str, Any], processes: int) -> tuple[int, float]:
    """As `measured`, of the first of several processes."""
    stages = [lever["stage"] for lever in raw["levers"] if lever["name"] == "zero"]
    config = ROOT / "recipes" / "accelerate" / "zero2-cpu-offload.yaml"
    kind = ["--cpu", "--num_machines", "1"]
    if stages:
        kind = ["--config_file", str(config), "--zero_stage", str(stages[0])]
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder) / "recipe.yaml", Path(folder) / "run"
        path.write_text(yaml.safe_dump(raw), encoding="utf-8")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable, "-m", "accelerate.commands.launch", *kind, "--num_processes",
            str(processes), "--main_process_port", str(port), "-m", "lowres", "run", str(path),
            "--output", str(output), "--force",
        ]  # fmt: skip
        # DeepSpeed may abort while Python ends: what counts is the record.
        done = subprocess.run(command, capture_output=True, text=True)
        assert (output / "record.json").exists(), done.stderr[-9000:]
        return figures(from_file(output / "record.json"))


def figures(record: RunRecord) -> tuple[int, float]:
    phases = record.measured.phases
    peak = max(phases[p].live_bytes or 0 for p in STEPS)
    assert record.measured.step_time is not None
    return peak, record.measured.step_time.p50_seconds


def pair(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe without a lever, and with it."""
    lever: Any = registry.load("lever", lever_of(name))
    fields = lever.sample_fields | WHERE.get(name, {}).get("fields", {})
    return recipe(name, []), recipe(name, [{"name": lever_of(name), **fields}])


def foreseen(name: str) -> int:
    """What a lever is planned to save at the peak of the updates, in bytes."""
    without, pulled = (load_recipe(raw) for raw in pair(name))
    cpu = devices.load("cpu")
    processes = processes_of(name)
    planned = plan(without, cpu, processes=processes)
    if "fields" in WHERE.get(name, {}) or planned.peak_phase not in STEPS:
        # The ladder weighs the whole run and the lever's defaults; here the updates are compared.
        return of_updates(planned) - of_updates(plan(pulled, cpu, processes=processes))
    (line,) = ladder(without, cpu, planned, f"lever {name}")
    assert line.saved_bytes is not None, line.problem
    return line.saved_bytes


def one(name: str, n: int) -> dict[str, Any]:
    """A lever's row."""
    done = runs_of(name, list(pair(name)) * n)
    runs = list(zip(done[::2], done[1::2], strict=True))
    (before, after) = (runs[0][0][0], runs[0][1][0])
    assert all((a[0], b[0]) == (before, after) for a, b in runs), "live bytes differ between runs"
    ratios = [b[1] / a[1] for a, b in runs]
    lever: Any = registry.load("lever", lever_of(name))
    return {
        "effect": lever.effect, "before": before, "after": after, "planned": foreseen(name),
        "ratio": statistics.median(ratios), "ratios": sorted(ratios), "n": n,
    }  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """The Markdown table."""
    rows = [
        "| lever | effect | without | with | saves | ladder line | time of an update "
        "| does not combine with |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    cells = Table.read().cells
    for name, row in record["levers"].items():
        saved = row["before"] - row["after"]
        lever = lever_of(name)
        form = load_recipe(pair(name)[1]).levers[-1].form()
        against = [
            other for other in registry.names("lever")
            if other != lever and cells[f"lora + {form} + {other}"].outcome != "works"
        ]  # fmt: skip
        low, high = row["ratios"][0], row["ratios"][-1]
        spread = f" ({low:.2f} to {high:.2f})" if row["n"] > 1 else ""
        rows.append(
            f"| `{lever}`{name.removeprefix(lever)} | {row['effect']} "
            f"| {format_bytes(row['before'])} "
            f"| {format_bytes(row['after'])} | {format_bytes(saved)} "
            f"| {format_bytes(row['planned'])} | x {row['ratio']:.2f}{spread} "
            f"| {', '.join(against) or 'none'} |"
        )
    told = record["environment"]
    n = min(row["n"] for row in record["levers"].values())
    head = (
        f"On {told['device']}, torch {told['versions']['torch']}, {told['date']}; at least {n} "
        f"alternating run(s) of {UPDATES} updates; the time of a single run is rough."
    )
    return "\n".join([head, "", *rows])


def text() -> str:
    """The page with the record's table."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    return page.put(PAGE.read_text(encoding="utf-8"), "levers", table(record))


def main() -> None:
    from lowres.bench.compatibility import surroundings

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--n", type=int, default=5)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"levers": {}}
    if RECORD.exists():
        record = json.loads(RECORD.read_text(encoding="utf-8"))
    record["environment"] = surroundings() | {"cpu": environment.processor()}
    for name in ROWS:
        if arguments.only not in ("", name, lever_of(name)):
            continue
        record["levers"][name] = one(name, arguments.n)
        print(name, record["levers"][name], flush=True)
        record["levers"] = dict(sorted(record["levers"].items()))
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
