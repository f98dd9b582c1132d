"""What each lever and optimizer saves and costs on a GPU, alone and in ladders, under small caps.

    python -m benchmarks.gpu.levers [--minutes 9] [--records DIR] [--configs DIR] [--only TEXT]
    python -m benchmarks.gpu.levers --plan [--only target]   # what is planned; needs no GPU
    python -m benchmarks.gpu.levers --summary                # the records as a table
    python -m benchmarks.gpu.levers --tiny [--only TEXT]     # small recipes on a CPU

Each recipe has a process of its own, and so has the plain one of its shape, which is run once in
every part that needs it: step times are ratios to that, and the losses of exact levers are compared
with its losses. A record that is there is kept: the command is given again until nothing is left.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu import lever_recipes, lever_summary
from benchmarks.gpu.boundaries import foresee
from benchmarks.gpu.lever_recipes import LeverCase
from benchmarks.gpu.part import ROOT, lacks_device, parser, prepared
from lowres.core.errors import LowresError
from lowres.memory import device as devices

RECORDS = ROOT / "benchmarks" / "records" / "levers" / "gpu"


def unite(wanted: Sequence[LeverCase], records: Path, skipped: Mapping[str, str]) -> None:
    """Put what the plain recipe gave into the record that it stands beside.

    A record whose other half is missing is dropped: the two belong to one part.

    Args:
        skipped: Plain recipes that this machine cannot run, with the reasons.
    """
    plain_of = _plain_of(wanted)
    for case in wanted:
        own = records / f"{case.name}.json"
        if case.beside is None or not own.exists():
            continue
        record = json.loads(own.read_text(encoding="utf-8"))
        if "beside" in record["suite"]:
            continue
        beside = plain_of[case.beside]
        other = records / f"{beside}.json"
        if other.exists():
            plain = json.loads(other.read_text(encoding="utf-8"))
            told = lever_summary.beside(record, plain, case.tolerance)
        elif beside in skipped:
            told = {"outcome": "skipped", "error": skipped[beside]}
        else:
            own.unlink()
            continue
        record["suite"] |= {"group": case.group, "beside": told}
        aside = own.with_suffix(".partial")
        aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        aside.replace(own)
    for name in plain_of:
        (records / f"{name}.json").unlink(missing_ok=True)


def order(wanted: Sequence[LeverCase], records: Path) -> list[LeverCase]:
    """What is to be run: a plain recipe only before the first of those that it stands beside."""
    out: dict[str, LeverCase] = {}
    by_name = {case.name: case for case in wanted}
    plain_of = _plain_of(wanted)
    for case in wanted:
        if case.beside is not None and not (records / f"{case.name}.json").exists():
            beside = plain_of[case.beside]
            out |= {beside: by_name[beside], case.name: case}
        elif case.beside is None and case.group == "recipe":
            out[case.name] = case
    return list(out.values())


def _plain_of(wanted: Sequence[LeverCase]) -> dict[str, str]:
    """Each plain recipe that others stand beside, to the first that is the same."""
    same: dict[str, str] = {}
    beside = {case.beside for case in wanted}
    return {
        case.name: same.setdefault(json.dumps([case.raw, case.varied], sort_keys=True), case.name)
        for case in wanted
        if case.name in beside
    }


def show_plans(wanted: Sequence[LeverCase], configs: Path) -> None:
    """What each recipe is planned to need, for this machine's card or else an H200."""
    device = devices.present() or devices.load("h200")
    seen = []
    for case in wanted:
        if case.raw in seen:
            continue  # Plain recipes of one shape are the same.
        seen.append(case.raw)
        try:
            found = foresee(case, configs / case.model, device, None)
        except LowresError as why:
            print(f"{case.name}: refused: {why}", flush=True)
            continue
        print(f"{case.name}: {lever_summary.planned(found.plan) or found.remark}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--plan", action="store_true")
    asked = options.parse_args(arguments)
    if asked.summary:
        print(lever_summary.report(asked.records or RECORDS))
        return 0
    if not asked.plan and lacks_device(asked):
        return 2
    every = [c for c in lever_recipes.cases(asked.tiny) if isinstance(c, LeverCase)]
    wanted = [c for c in every if asked.only in c.name]
    # States on the host and two models of 8 B are what 128 GiB of it have room for.
    with prepared(asked, RECORDS, "levers", most=2) as part:
        if asked.plan:
            show_plans(wanted, part.configs)
            return 0
        unite(wanted, part.records, {})
        part.run(order(wanted, part.records))
        unite(wanted, part.records, part.skipped)
        if asked.tiny and asked.records is None:
            print(lever_summary.report(part.records))
    return part.say()


if __name__ == "__main__":
    sys.exit(main())
