"""Plans against real runs on the CPU, to the byte: many small recipes, each planned and run.

    python -m benchmarks.planner.truth [--only TEXT] [--records DIR]

Three kinds of models, every lever and optimizer, batches, lengths, types. Each run's record
holds what was planned beside what was measured; a record that is there already is kept, so the
command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import lowres
from benchmarks.planner.truth_recipes import recipes
from lowres.core import record as records
from lowres.core.errors import InputError, LowresError

HERE = Path(__file__).resolve().parent
RECORDS = HERE.parent / "records" / "planner" / "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="recipes whose name holds this")
    parser.add_argument("--records", type=Path, default=RECORDS)
    arguments = parser.parse_args()
    arguments.records.mkdir(parents=True, exist_ok=True)
    refused = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, raw in recipes(Path(temporary)):
            place = arguments.records / f"{name}.json"
            if arguments.only not in name or place.exists():
                continue
            try:
                record = lowres.run(
                    lowres.load_recipe(raw), output_folder=Path(temporary) / name, quiet=True
                )
            except InputError as error:
                refused.append(f"{name}: {error.problems[0]}")
                continue
            except LowresError as error:
                print(f"{name}: FAILED: {error}", flush=True)
                continue
            # The record is published: where its model and texts lay is nobody's concern.
            text = records.to_json(record).replace(temporary, "temporary")
            text = text.replace(f"{HERE.parent.parent}/", "")
            place.write_text(text, encoding="utf-8")
            print(f"{name}: {told(record)}", flush=True)
    for line in refused:
        print(f"refused  {line}")


def told(record: records.RunRecord) -> str:
    """Predicted less measured bytes of each phase."""
    if record.plan is None:
        return f"no plan {[e.text for e in record.events]}"
    planned = record.plan["phases"]
    return json.dumps({
        phase: planned[phase]["live_bytes"] - (memory.live_bytes or 0)
        for phase, memory in record.measured.phases.items()
    })  # fmt: skip


if __name__ == "__main__":
    main()
