"""A suite: several recipes, one hyperparameter searched for each at equal cost, then several seeds.

Each run is a process of its own, so that its resident memory is its own. Finished runs are kept as
records and never repeated: a suite that was cut goes on where it stopped.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from lowres.bench.searching import Search, as_good_as_best, to_try
from lowres.core import record as record_module
from lowres.core import registry
from lowres.core.errors import InputError, LowresError
from lowres.core.parts import part
from lowres.core.paths import stop_if_unwritable
from lowres.core.reading import load_recipe
from lowres.core.recipe import Recipe
from lowres.core.record import RunRecord, Score
from lowres.run.output import RECORD


class RunFailed(LowresError):
    """A run that left no result; the others are made all the same."""


KEPT = ("ok", "oom", "does_not_fit", "diverged")
"""Outcomes that are results; the others say that the run has to be made again."""


@part
class Methods:
    """One recipe with each method on each task, in place of `recipes`.

    Args:
        recipe: The file.
        tasks: Short name to `key=value` changes. Records of each go to a folder of their own.
        names: Methods, or all there are. One that refuses the recipe is left out, and said.
    """

    recipe: str
    tasks: dict[str, tuple[str, ...]]
    names: tuple[str, ...] | Literal["all"] = "all"


@part
class Suite:
    """What a suite file holds.

    Args:
        name: Folder of its records.
        recipes: Short name to recipe file.
        methods: Instead, one recipe with many methods.
        seeds: Each recipe is run with each.
        search: None runs the recipes as they are.
        settings: `key=value` changes for every run.
    """

    name: str
    recipes: dict[str, str] = field(default_factory=dict)
    methods: Methods | None = None
    seeds: tuple[int, ...] = (0,)
    search: Search | None = None
    settings: tuple[str, ...] = ()


def load(path: Path) -> Suite:
    """Read a suite file. Raises InputError with every problem."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        suite = TypeAdapter(Suite).validate_python(raw)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"'{path}'", [f"cannot be read: {why}"]) from None
    except yaml.YAMLError as error:
        raise InputError(f"'{path}'", [f"is not valid YAML: {error}"]) from None
    except ValidationError as error:
        found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise InputError(f"'{path}'", found) from None
    if bool(suite.recipes) == (suite.methods is not None):
        raise InputError(f"'{path}'", ["give either recipes or methods"])
    if suite.search is not None and not suite.search.times_hint:
        counts = {name: len(suite.search.values.get(name, ())) for name in suite.recipes}
        if len(set(counts.values())) != 1 or not all(counts.values()):
            raise InputError(
                f"'{path}'", [f"search.values differ in number or are missing: {counts}"]
            )
    return suite


def run(suite: Suite, records: Path, scratch: Path, say: Callable[[str], None]) -> list[RunRecord]:
    """Run what has no record yet.

    Args:
        records: Records go to `<records>/<suite>/<device>/`, search runs to `search/` below it;
            of several tasks to `<records>/<suite>-<task>/<device>/`.
        scratch: Where runs write their checkpoints and models; emptied after each.
        say: Takes a line for the user.

    Returns:
        The records of the final runs, in order. Seeds are the outer loop and tasks the next, so
        that a cut leaves whole comparisons.

    Raises:
        RunFailed: At the end, with the names of those that left no result.
    """
    chosen: dict[tuple[str, str], list[str]] = {}
    first: dict[str, float] = {}
    out, failed = [], []
    for seed in suite.seeds:
        for group, task_settings, entries in _groups(suite, say):
            home = records / group / _device()
            for name, (recipe, own) in entries.items():
                settings = [*suite.settings, *task_settings, *own]
                if (group, name) in chosen or f"{group}/{name}" in failed:
                    continue
                if suite.search is None:
                    chosen[group, name] = settings
                    continue
                search, tried = suite.search, home / "search"
                try:
                    values = to_try(search, name, load_recipe(recipe, settings), first.get(name))
                    best = _searched(
                        search, name, recipe, settings, values, tried, scratch, say, first.get(name)
                    )
                    first.setdefault(name, best)
                    chosen[group, name] = [*settings, f"{search.key}={_number(best)}"]
                except RunFailed as error:
                    say(str(error))
                    failed.append(f"{group}/{name}")
            for name, (recipe, _) in entries.items():
                if (group, name) not in chosen:
                    continue
                changes = [*chosen[group, name], f"loop.seed={seed}"]
                target = home / f"{name}-seed{seed}.json"
                try:
                    out.append(_one(recipe, changes, target, scratch, say))
                except RunFailed as error:
                    say(str(error))
                    failed.append(f"{group}/{target.stem}")
    if failed:
        raise RunFailed(
            f"{len(out)} runs have their records; no result of {', '.join(dict.fromkeys(failed))}; "
            "the reasons are above, and the same command tries these again"
        )
    return out


Entries = dict[str, tuple[str, list[str]]]
"""Short name to recipe file and changes."""


def _groups(
    suite: Suite, say: Callable[[str], None]
) -> Iterator[tuple[str, tuple[str, ...], Entries]]:
    """What is compared with one another: folder of the records, changes of all, recipes."""
    wanted = suite.methods
    if wanted is None:
        yield suite.name, (), {name: (recipe, []) for name, recipe in suite.recipes.items()}
        return
    names = registry.names("method") if wanted.names == "all" else wanted.names
    for task, settings in wanted.tasks.items():
        entries: Entries = {}
        for name in names:
            own = [f"method={{name: {name}}}"]
            try:
                load_recipe(wanted.recipe, [*suite.settings, *settings, *own])
            except InputError as error:
                say(f"{task}: {name} is left out: {error.problems[0].text}")
                continue
            entries[name] = (wanted.recipe, own)
        yield f"{suite.name}-{task}", settings, entries


def _searched(
    search: Search, name: str, recipe: str, settings: Sequence[str], values: Sequence[float],
    home: Path, scratch: Path, say: Callable[[str], None], before: float | None = None,
) -> float:  # fmt: skip
    """The value that all runs of the method take."""
    task = load_recipe(recipe, settings).task
    metric = search.metric or task.metric
    sign = -1.0 if metric in task.lower_is_better else 1.0
    found: dict[float, Score] = {}
    for value in values:
        changes = [*settings, *search.settings, f"{search.key}={_number(value)}"]
        try:
            record = _one(recipe, changes, home / f"{name}-{value:g}.json", scratch, say)
        except RunFailed as error:
            say(str(error))
            continue
        for score in record.final_scores():
            asked = (score.split, score.metric) == (search.split, metric)
            if asked and math.isfinite(score.value):
                found[value] = score
    if not found:
        raise RunFailed(f"no run of '{name}' scored {metric} on {search.split}")
    best = as_good_as_best(found, before, sign)
    table = ", ".join(f"{v:g}: {s.value:.3f} +- {s.stderr:.3f}" for v, s in found.items())
    say(f"{name}: {search.key} {best:g} ({search.split} {metric} by value: {table})")
    return best


def _number(value: float) -> str:
    """As a recipe takes it: keys of whole numbers refuse 4.0."""
    return repr(int(value) if value.is_integer() else value)


def _one(
    recipe: str, changes: Sequence[str], target: Path, scratch: Path, say: Callable[[str], None]
) -> RunRecord:
    wanted = load_recipe(recipe, changes)
    if target.exists():
        there = record_module.from_file(target)
        if there.task_version == wanted.task.version and _is(there, wanted):
            return there
        raise InputError(
            f"'{target}'",
            ["it is of another recipe than the suite now asks for; move it away to rerun"],
        )
    stop_if_unwritable(target, makes_folders=True)
    say(f"run {target.stem}: {' '.join(changes)}")
    # Another suite may run beside this one.
    scratch = scratch / f"{target.stem}-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    command: list[Any] = [sys.executable, "-m", "lowres", "run", recipe, "--output", str(scratch)]
    for change in changes:
        command += ["--set", change]
    done = subprocess.run(command, capture_output=True, text=True)
    written = scratch / RECORD
    if not written.exists():
        raise RunFailed(f"{target.stem} left no record:\n{done.stderr[-2000:]}")
    outcome = record_module.from_file(written).outcome
    if outcome not in KEPT:
        raise RunFailed(f"{target.stem} ended {outcome}; it is not kept:\n{done.stderr[-2000:]}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(written, target)
    shutil.rmtree(scratch, ignore_errors=True)
    return record_module.from_file(target)


def _is(record: RunRecord, wanted: Recipe) -> bool:
    """Whether the run is the wanted one; keys that came since it was made have their defaults."""
    try:
        made = load_recipe(record.recipe)
    except InputError:
        return False
    return made.digest == wanted.digest and made.resolved()["task"] == wanted.resolved()["task"]


def _device() -> str:
    """Folder name of the device that runs will use."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
