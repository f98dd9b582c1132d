"""A suite: several recipes, one hyperparameter searched for each at equal cost, then several seeds.

Each run is a process of its own, so that its resident memory is its own. Finished runs are kept as
records and never repeated: a suite that was cut goes on where it stopped.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from lowres.core import record as record_module
from lowres.core.errors import InputError, LowresError
from lowres.core.parts import part
from lowres.core.reading import load_recipe
from lowres.core.record import RunRecord
from lowres.run.output import RECORD

KEPT = ("ok", "oom", "does_not_fit", "diverged")
"""Outcomes that are results; the others say that the run has to be made again."""


@part
class Search:
    """How a value is chosen before the seeds are run.

    Args:
        key: The recipe key that is searched.
        values: For each recipe the values to try; equally many for all, so that none is favoured.
        settings: `key=value` changes for the search runs, such as held-out rows to score on.
        split, metric: What decides; the largest value wins.
    """

    key: str
    values: dict[str, tuple[float, ...]]
    settings: tuple[str, ...]
    split: str
    metric: str


@part
class Suite:
    """What a suite file holds.

    Args:
        name: Folder of its records.
        recipes: Short name to recipe file.
        seeds: Each recipe is run with each.
        search: None runs the recipes as they are.
        settings: `key=value` changes for every run.
    """

    name: str
    recipes: dict[str, str]
    seeds: tuple[int, ...] = (0,)
    search: Search | None = None
    settings: tuple[str, ...] = field(default=())


def load(path: Path) -> Suite:
    """Read a suite file. Raises InputError with every problem."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        suite = TypeAdapter(Suite).validate_python(raw)
    except OSError as error:
        raise InputError(f"'{path}'", [f"cannot be read: {error.strerror}"]) from None
    except yaml.YAMLError as error:
        raise InputError(f"'{path}'", [f"is not valid YAML: {error}"]) from None
    except ValidationError as error:
        found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise InputError(f"'{path}'", found) from None
    if suite.search is not None:
        counts = {name: len(suite.search.values.get(name, ())) for name in suite.recipes}
        if len(set(counts.values())) != 1 or not all(counts.values()):
            raise InputError(
                f"'{path}'", [f"search.values differ in number or are missing: {counts}"]
            )
    return suite


def run(suite: Suite, records: Path, scratch: Path, say: Callable[[str], None]) -> list[RunRecord]:
    """Run what has no record yet.

    Args:
        records: Records go to `<records>/<suite>/<device>/`, search runs to `search/` below it.
        scratch: Where runs write their checkpoints and models; emptied after each.
        say: Takes a line for the user.

    Returns:
        The records of the final runs, in order. Seeds are the outer loop, so that a cut leaves
        whole comparisons.
    """
    home = records / suite.name / _device()
    chosen: dict[str, list[str]] = {}
    for name, recipe in suite.recipes.items():
        chosen[name] = list(suite.settings)
        if suite.search is not None:
            value = _best(suite, suite.search, name, recipe, home / "search", scratch, say)
            chosen[name].append(f"{suite.search.key}={value!r}")
    out = []
    for seed in suite.seeds:
        for name, recipe in suite.recipes.items():
            changes = [*chosen[name], f"loop.seed={seed}"]
            out.append(_one(recipe, changes, home / f"{name}-seed{seed}.json", scratch, say))
    return out


def _best(
    suite: Suite,
    search: Search,
    name: str,
    recipe: str,
    home: Path,
    scratch: Path,
    say: Callable[[str], None],
) -> float:
    """The value with the best score on the search split; the smaller one among equals."""
    found: dict[float, float] = {}
    for value in sorted(search.values[name]):
        changes = [*suite.settings, *search.settings, f"{search.key}={value!r}"]
        record = _one(recipe, changes, home / f"{name}-{value:g}.json", scratch, say)
        for score in record.final_scores():
            if (score.split, score.metric) == (search.split, search.metric):
                found[value] = score.value
    if not found:
        raise InputError(
            "the suite", [f"no run of '{name}' scored {search.metric} on {search.split}"]
        )
    best = max(found, key=lambda value: found[value])
    table = ", ".join(f"{value:g}: {score:.3f}" for value, score in found.items())
    say(f"{name}: {search.key} {best:g} ({search.split} {search.metric} by value: {table})")
    return best


def _one(
    recipe: str, changes: Sequence[str], target: Path, scratch: Path, say: Callable[[str], None]
) -> RunRecord:
    wanted = load_recipe(recipe, changes)
    if target.exists():
        there = record_module.from_file(target)
        same_task = there.recipe["task"] == wanted.resolved()["task"]
        if (
            there.digest == wanted.digest
            and same_task
            and there.task_version == wanted.task.version
        ):
            return there
        raise InputError(
            f"'{target}'",
            ["it is of another recipe than the suite now asks for; move it away to rerun"],
        )
    say(f"run {target.stem}: {' '.join(changes)}")
    shutil.rmtree(scratch, ignore_errors=True)
    command: list[Any] = [sys.executable, "-m", "lowres", "run", recipe, "--output", str(scratch)]
    for change in changes:
        command += ["--set", change]
    done = subprocess.run(command, capture_output=True, text=True)
    written = scratch / RECORD
    if not written.exists():
        raise LowresError(f"{target.stem} left no record:\n{done.stderr[-2000:]}")
    outcome = record_module.from_file(written).outcome
    if outcome not in KEPT:
        raise LowresError(f"{target.stem} ended {outcome}; it is not kept:\n{done.stderr[-2000:]}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(written, target)
    shutil.rmtree(scratch, ignore_errors=True)
    return record_module.from_file(target)


def _device() -> str:
    """Folder name of the device that runs will use."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
