"""What was measured of methods, for `lowres show method`: what each saves, rates that were good.

    python -m benchmarks.methods_found

Writes `lowres/assets/methods/found.json` from the records of `python -m benchmarks.methods` and of
the searches of learning rates.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.levers import ROOT
from benchmarks.methods import records
from benchmarks.methods_page import saved
from lowres.core.record import Score, from_file

ASSET = ROOT / "lowres" / "assets" / "methods" / "found.json"
SEARCHES = ROOT / "benchmarks" / "records"
METRICS = ("log_likelihood", "matthews", "accuracy")
"""Of the held-out rows; the first that a record has is what its rate was chosen by."""


def found() -> dict[str, Any]:
    """Method to what it saves and does not, and a rate of each search."""
    measured = {n: r["measured"] for n, r in records().items() if "measured" in r}
    rates = good_rates()
    out: dict[str, Any] = {}
    for name, figures in sorted(measured.items()):
        saves, not_ = saved(figures, measured["full"])
        out[name] = {"saves": saves, "does_not_save": not_, "rates": rates.get(name, [])}
    return out


def taken() -> dict[tuple[str, str], float]:
    """The rate that each suite's runs took, by its folder and the method, where every one of them
    scored better than the majority's answer."""
    out: dict[tuple[str, str], float] = {}
    lost = set()
    for folder in SEARCHES.glob("*/cpu/search"):
        for file in sorted(folder.parent.glob("*.json")):
            record = from_file(file)
            key = folder.parent.parent.name, record.recipe["method"]["name"]
            out[key] = record.recipe["optimizer"]["lr"]
            first = record.final_scores()[0]
            if first.majority is not None and first.value <= first.majority:
                lost.add(key)
    return {key: rate for key, rate in out.items() if key not in lost}


def good_rates() -> dict[str, list[dict[str, Any]]]:
    """Of each method what was tried in each search and what the runs after it took."""
    rates = taken()
    tried: dict[tuple[Any, ...], dict[float, Score]] = defaultdict(dict)
    for file in sorted(SEARCHES.glob("*/cpu/search/*.json")):
        record = from_file(file)
        recipe = record.recipe
        scores = {s.metric: s for s in record.final_scores() if s.split == "held_out"}
        score = next(scores[m] for m in METRICS if m in scores)
        task, model = recipe["task"]["name"], recipe["model"]["checkpoint"]
        rows = next(d.rows for d in record.data if d.split == "train")
        key = (recipe["method"]["name"], file.parent.parent.parent.name, task, rows, model,
               recipe["optimizer"]["name"])  # fmt: skip
        tried[key][recipe["optimizer"]["lr"]] = score
    out: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (method, suite, task, rows, model, optimizer), scored in tried.items():
        # All the same: nothing was learned, and nothing is told.
        if (suite, method) in rates and len({s.value for s in scored.values()}) > 1:
            told = {"rate": rates[suite, method], "tried": sorted(scored), "task": task,
                    "rows": rows, "model": model, "optimizer": optimizer}  # fmt: skip
            out[method].append(told)
    return out


def text() -> str:
    return json.dumps(found(), indent=1) + "\n"


def main() -> None:
    Path(ASSET).write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
