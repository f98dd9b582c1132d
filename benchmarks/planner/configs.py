"""Every configuration planned with full, LoRA and LoRA over 4-bit weights; and depth, checked.

    python -m benchmarks.planner.configs [--exact N] [--folder DIR] [--record FILE]

The short trace, extended in depth, is compared with the trace of every block for the first N
configurations; all are planned for an 80 GiB card, so that what fits where can be read off.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from lowres.core import paths
from lowres.core.errors import LowresError
from lowres.core.reading import load_recipe
from lowres.memory import device as devices
from lowres.planning.plan import plan
from lowres.planning.starting import starting_recipe

RECORD = Path(__file__).resolve().parent.parent / "records" / "planner" / "configs.json"
METHODS: dict[str, list[str]] = {
    "full": ["method=full", "levers=[gradient_checkpointing]"],
    "lora": ["levers=[gradient_checkpointing]"],
    "lora-nf4": ["levers=[gradient_checkpointing, nf4_weights]"],
}


def one(folder: Path, method: str, exact: bool) -> dict[str, Any]:
    """Plan one configuration; what is refused says why."""
    started = time.monotonic()
    try:
        raw = starting_recipe(str(folder))
        recipe = load_recipe(raw, METHODS[method])
        found = plan(recipe, devices.load("a100-80gb"), exact=exact)
    except LowresError as error:
        return {"refused": str(error)}
    return {
        "live_bytes": {name: phase.live_bytes for name, phase in found.phases.items()},
        "allocated_bytes": found.peak.allocated_bytes,
        "needed_bytes": found.needed_bytes,
        "peak": f"{found.peak_phase}: {found.peak.instant}",
        "depth": found.depth,
        "total": found.total,
        "trainable": found.trainable,
        "seconds": round(time.monotonic() - started, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exact", type=int, default=24, help="configurations to trace whole")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    root = arguments.folder or paths.data_folder() / "configs"
    folders = sorted(p.parent for p in root.glob("*/config.json") if arguments.only in str(p))
    done: dict[str, Any] = {}
    if arguments.record.exists():
        done = json.loads(arguments.record.read_text(encoding="utf-8"))
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    for number, folder in enumerate(folders):
        for method in METHODS:
            key = f"{folder.name} {method}"
            entry = done.setdefault(key, {})
            if "plan" not in entry:
                entry["plan"] = one(folder, method, exact=False)
                print(key, entry["plan"], flush=True)
            # Large and small in turn, so that a part of the list is no special part.
            wanted = number % 2 == 0 and number // 2 < arguments.exact and method == "lora"
            if wanted and "exact" not in entry and "refused" not in entry["plan"]:
                entry["exact"] = one(folder, method, exact=True)
                print(key, "exact", entry["exact"], flush=True)
            arguments.record.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
