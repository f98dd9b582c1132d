"""Plans against real runs on a GPU: recipes of 0.1 to 8 B under the budgets of small cards.

    python -m benchmarks.gpu.planner [--minutes 9] [--records DIR] [--configs DIR] [--only TEXT]
    python -m benchmarks.gpu.planner --boundaries     # beforehand, without a GPU: saves time on one
    python -m benchmarks.gpu.planner --summary        # the records as a table
    python -m benchmarks.gpu.planner --tiny           # eight small recipes on a CPU, in a minute

Each recipe has a process of its own, for a clean allocator and context. A record that is there is
kept, so the command is given again until nothing is left. Where a machine is had for minutes and
keeps nothing, bring the records back after each part, and let them travel with the next.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import summary, tiny
from benchmarks.gpu.boundaries import NoBoundary, foresee_side
from benchmarks.gpu.part import ROOT, lacks_device, parser, prepared
from benchmarks.gpu.recipes import Case, cases
from lowres.memory import device as devices

RECORDS = ROOT / "benchmarks" / "records" / "planner" / "gpu"


def search_boundaries(wanted: Sequence[Case], configs: Path, records: Path) -> None:
    """Find the lengths of every boundary; those that are known and still hold are kept."""
    device = devices.present() or devices.load("h200")
    for case in wanted:
        if case.side is not None:
            with contextlib.suppress(NoBoundary):
                found = foresee_side(case, configs / case.model, device, records / "boundaries")
                assert found.plan is not None
                needed, length = found.plan.needed_bytes, found.recipe.loop.max_length
                print(f"{case.name}: {length} tokens, {needed:,} bytes", flush=True)
                continue
            print(f"{case.name}: no boundary", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--boundaries", action="store_true")
    asked = options.parse_args(arguments)
    if asked.summary:
        print(summary.report(asked.records or RECORDS))
        return 0
    if not asked.boundaries and lacks_device(asked):
        return 2
    wanted = [c for c in (tiny.cases() if asked.tiny else cases()) if asked.only in c.name]
    with prepared(asked, RECORDS) as part:
        if asked.boundaries:
            search_boundaries(wanted, part.configs, part.records)
            return 0
        part.run(wanted)
        if asked.tiny and asked.records is None:
            print(summary.report(part.records))
    return part.say()


if __name__ == "__main__":
    sys.exit(main())
