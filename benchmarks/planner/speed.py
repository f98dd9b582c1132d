"""How long planning takes, on this machine.

    python -m benchmarks.planner.speed [--n 3]

A plan of Llama 3.1 8B with LoRA over 4-bit weights, the same with every block traced, and a search
over its recipes for an 8 GiB card. Each is a process of its own; be alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lowres.core import paths

RECORD = Path(__file__).resolve().parent.parent / "records" / "planner" / "speed.json"
LEVERS = "levers=[gradient_checkpointing, nf4_weights]"


def one(what: str, arguments: list[str], key: str) -> dict[str, Any]:
    """Run a command once: its own figure, its wall clock, its peak memory."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "lowres", *arguments, "--json"], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    whole = time.monotonic() - started
    out = json.loads(done.stdout)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    found = {"what": what, "planning": out[key], "whole": whole, "peak": peak}
    print({**found, "considered": out.get("considered")}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=3)
    n = parser.parse_args().n
    model = str(paths.data_folder() / "configs" / "Llama-3.1-8B")
    plan = ["plan", "--model", model, "--gpu", "rtx-4060", "--set", LEVERS]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        fit = ["fit", "--model", model, "--task", "gsm8k", "--device-gib", "8", "--output",
               str(Path(folder) / "fit.yaml")]  # fmt: skip
        for what, arguments, key in (
            ("plan", [*plan, "--no-changes"], "planning_seconds"),
            ("plan with its ladder of changes", plan, "planning_seconds"),
            ("plan --exact", [*plan, "--no-changes", "--exact"], "planning_seconds"),
            ("fit", fit, "seconds"),
        ):
            runs = [one(what, arguments, key) for _ in range(n)]
            rows.append({
                "what": what, "n": n,
                "planning_seconds": statistics.median(r["planning"] for r in runs),
                "whole_seconds": statistics.median(r["whole"] for r in runs),
                "peak_resident_bytes": max(r["peak"] for r in runs),
            })  # fmt: skip
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    record = {"processor": platform.machine(), "cores": os.cpu_count(), "rows": rows}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
