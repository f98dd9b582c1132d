"""What was measured of methods, for `lowres show method`: what each saves, rates that were good.

In `lowres/assets/methods/found.json`, from the records of `python -m benchmarks.methods`, of the
searches of learning rates, and of the runs after them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from benchmarks.levers import ROOT
from benchmarks.methods import records
from benchmarks.methods_page import saved
from lowres.core.record import RunRecord, from_file

PAGE = ROOT / "lowres" / "assets" / "methods" / "found.json"
SUITES = ROOT / "benchmarks" / "records"


def found() -> dict[str, Any]:
    """Method to what it saves and does not, and the rate that each suite took."""
    measured = {n: r["measured"] for n, r in records().items() if "measured" in r}
    rates = good_rates()
    out: dict[str, Any] = {}
    for name, figures in sorted(measured.items()):
        saves, not_ = saved(figures, measured["full"])
        out[name] = {"saves": saves, "does_not_save": not_, "rates": rates.get(name, [])}
    return out


def _key(record: RunRecord, suite: str) -> tuple[str, str, str, str, str]:
    recipe = record.recipe
    return (recipe["method"]["name"], suite, recipe["task"]["name"], recipe["model"]["checkpoint"],
            recipe["optimizer"]["name"])  # fmt: skip


def taken() -> dict[tuple[str, ...], float]:
    """The rate that a suite's runs of a method took, where every one of them learned: scored better
    than the majority's answer by two standard errors."""
    out: dict[tuple[str, ...], float] = {}
    lost = set()
    for folder in SUITES.glob("*/cpu/search"):
        for file in sorted(folder.parent.glob("*.json")):
            record = from_file(file)
            key = _key(record, folder.parent.parent.name)
            out[key] = record.recipe["optimizer"]["lr"]
            first = record.final_scores()[0]
            if first.majority is not None and first.value <= first.majority + 2 * first.stderr:
                lost.add(key)
    return {key: rate for key, rate in out.items() if key not in lost}


def good_rates() -> dict[str, list[dict[str, Any]]]:
    """Of each method what was tried in each search and what the runs after it took."""
    rates = taken()
    tried: dict[tuple[str, ...], set[float]] = defaultdict(set)
    rows: dict[tuple[str, ...], int] = {}
    for file in sorted(SUITES.glob("*/cpu/search/*.json")):
        record = from_file(file)
        key = _key(record, file.parent.parent.parent.name)
        tried[key].add(record.recipe["optimizer"]["lr"])
        rows[key] = next(d.rows for d in record.data if d.split == "train")
    out: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for key in sorted(rates.keys() & tried.keys()):
        method, _, task, model, optimizer = key
        told = {"rate": rates[key], "tried": sorted(tried[key]), "task": task, "rows": rows[key],
                "model": model, "optimizer": optimizer}  # fmt: skip
        out[method].append(told)
    return out


def text() -> str:
    return json.dumps(found(), indent=1) + "\n"
