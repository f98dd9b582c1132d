"""Which method to try first: ranked by records at hand and by what papers found, with the evidence.

A method's place in a comparison lies between 0 (its worst) and 1 (its best); its score is the mean
of its places, weighted by how near a comparison is to what is asked and, for runs, by how far they
differ beyond chance, with one part of .5 so that little evidence decides little. A method without
any is not ranked: nothing is known of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowres.bridges.kinds import kind_of
from lowres.core import registry
from lowres.core.errors import InputError
from lowres.core.learner import Kind
from lowres.core.record import RunRecord
from lowres.memory import device as devices
from lowres.planning import assumed
from lowres.planning.starting import starting_recipe
from lowres.recommend import findings as found_by_others
from lowres.recommend import possible
from lowres.recommend.findings import Comparison, TaskKind, place

OWN, OTHER_MODEL, PAPER, DISTANT = 4.0, 2.0, 2.0, 0.25
"""Weights: a record of this model; of another one; a paper of such tasks and sizes; of others."""
OTHER_KIND = 0.5
"""Times these, where the model is of another kind, as an encoder is beside a decoder."""
NEAR_ROWS = 10
"""A record speaks for task sizes up to so many times more or fewer rows."""
TASKS: dict[TaskKind, str] = {"classification": "sst2", "generation": "gsm8k"}
"""Stand-ins whose shapes are planned; their data are not read."""

Setting = tuple[str, float]
"""All of a recipe but its seed, and the learning rate."""
RunScore = tuple[float, float]
"""A run's score and its standard error over the rows that it was scored on."""


@dataclass
class Evidence:
    """One comparison's word on a method.

    Args:
        near: Whether it is of such tasks, sizes and inputs.
        apart: In what it differs from what is asked; empty where in nothing.
    """

    source: str
    url: str | None
    setting: str
    says: str
    place: float
    weight: float
    near: bool
    apart: str = ""


@dataclass
class Advice:
    """One method.

    Args:
        score: None where nothing is known.
        fits: With the levers; None where neither a plan nor the least that it needs decides.
        needed_bytes: Of a plan; None where none was made.
        at_least_bytes: Without activations; None where it cannot be had.
        refused: Why it cannot be had with the model.
        unknown: What is not known of it, in sentences.
    """

    method: str
    score: float | None
    learning_rates: tuple[float, float]
    evidence: list[Evidence] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    fits: bool | None = None
    needed_bytes: int | None = None
    at_least_bytes: int | None = None
    levers: tuple[str, ...] = ()
    refused: str | None = None


def advise(
    model: str, rows: int, device_gib: float, kind: TaskKind | None, records: Iterable[RunRecord]
) -> list[Advice]:
    """Every method, the one to try first at the head; those that are known not to fit follow the
    others, then those that the model refuses; those of which nothing is known come last.

    Args:
        rows: Training rows.
        kind: None takes what suits the model.

    Raises:
        InputError: For a size, a model or a kind that makes no sense.
    """
    if rows < 1:
        raise InputError("--task-size", [f"{rows} is no number of training rows; give 1 or more"])
    device = devices.generic(device_gib)
    config = assumed.config_of(model)
    sort = kind_of(config)
    writes = sort in ("decoder", "encoder_decoder")
    if kind == "generation" and not writes:
        text = (f"{kind} asks for text, and '{model}' is a(n) {sort}, which writes none; give "
                "--kind classification, or a model that writes")  # fmt: skip
        raise InputError("--kind", [text])
    if kind is None:
        kind = "generation" if writes else "classification"
    start = starting_recipe(model, TASKS[kind])
    papers = found_by_others.read()
    own = list(_of_records(records, model, sort, rows, kind))
    names = registry.names("method")
    out = []
    for name in names:
        cls: Any = registry.load("method", name)
        one = Advice(name, None, cls.learning_rate_hint)
        one.evidence = [e for places in own for m, e in places.items() if m == name]
        one.evidence += [
            _of_paper(t, name, sort, rows, kind) for t in papers.tables if name in t.places()
        ]
        if one.evidence:
            weights = [1.0, *(e.weight for e in one.evidence)]
            places = [0.5, *(e.place for e in one.evidence)]
            one.score = statistics.fmean(places, weights)
        one.evidence.sort(key=lambda e: -e.weight)
        one.remarks = [f"{r.says} ({r.source})" for r in papers.remarks if name in r.methods]
        one.unknown = list(_unknown(one, model, sort, rows, kind))
        out.append(one)
    out.sort(key=lambda a: (a.score is None, -(a.score or 0.0), a.method))
    possible.fill_in(out, start, config, device)
    out.sort(key=lambda a: (a.score is None, a.refused is not None, a.fits is False))
    return out


def _of_paper(table: Comparison, method: str, sort: Kind, rows: int, kind: TaskKind) -> Evidence:
    near = table.speaks_for(rows, kind)
    apart = ["" if near else "of other tasks or sizes", _otherwise(table.model, sort)]
    near &= _reads(table.model) == _reads(sort)
    weight = (PAPER if table.model == sort else PAPER * OTHER_KIND) if near else DISTANT
    digest = " (from a digest of it)" if table.basis == "digest" else ""
    return Evidence(
        table.source + digest, table.url, table.setting, table.told(method),
        table.places()[method], weight, near, ", ".join(filter(None, apart)),
    )  # fmt: skip


def _reads(sort: Kind) -> str:
    return "images" if sort == "vision" else "text"


def _otherwise(theirs: Kind | None, ours: Kind) -> str:
    """In what a model is of another kind, in words; empty where in nothing."""
    if theirs == ours:
        return ""
    if theirs is None:
        return "of a model of unknown kind"
    reads = "" if _reads(theirs) == _reads(ours) else f" of {_reads(theirs)}"
    return f"of another kind of model ({theirs}{reads})"


def _sort_of(checkpoint: str) -> Kind | None:
    try:
        return kind_of(assumed.config_of(checkpoint))
    except InputError:
        return None  # Its configuration is not at hand.


def _of_records(
    records: Iterable[RunRecord], model: str, sort: Kind, rows: int, kind: TaskKind
) -> Iterator[dict[str, Evidence]]:
    """For each model, task, split and size that several methods were run on: their places."""
    groups: dict[tuple[Any, ...], dict[str, dict[Setting, list[RunScore]]]] = {}
    for record in records:
        told = _score_of(record)
        if told is not None:
            key, setting, value = told
            method = record.recipe["method"]["name"]
            groups.setdefault(key, {}).setdefault(method, {}).setdefault(setting, []).append(value)
    sorts = {checkpoint: _sort_of(checkpoint) for checkpoint, *_ in groups if checkpoint != model}
    for (checkpoint, task, split, metric, trained, asks, higher), methods in groups.items():
        sign = 1.0 if higher else -1.0
        best = {m: max((sign * _mean(v), len(v), lr, v) for (_, lr), v in s.items())
                for m, s in methods.items()}  # fmt: skip
        low, high = min(m for m, *_ in best.values()), max(m for m, *_ in best.values())
        if high == low:
            continue  # One method alone, or all the same: no order.
        same = checkpoint == model
        theirs = sort if same else sorts[checkpoint]
        near = rows / NEAR_ROWS <= trained <= rows * NEAR_ROWS and asks == kind
        weight = (OWN if same else OTHER_MODEL) * (1.0 if near else 0.25)
        weight *= 1.0 if theirs == sort else OTHER_KIND
        if theirs is not None and _reads(theirs) != _reads(sort):
            near, weight = False, DISTANT
        share = beyond_chance([runs for *_, runs in best.values()])
        apart = ["" if near else "of other tasks or sizes", _otherwise(theirs, sort),
                 "mostly chance" if share < 0.5 else ""]  # fmt: skip
        measured = f"{task}, {trained} rows, {metric} on {split}"
        yield {
            m: Evidence(
                f"records of {'this model' if same else checkpoint}", None, measured,
                f"{sign * mean:.3g}, mean of {n} run(s) at its best setting (optimizer.lr {lr:g}), "
                f"between {sign * low:.3g} and {sign * high:.3g}, {share:.0%} of the variance "
                "beyond chance",
                place(mean, low, high), weight * share, near, ", ".join(filter(None, apart)),
            )
            for m, (mean, n, lr, _) in best.items()
        }  # fmt: skip


def _mean(runs: Sequence[RunScore]) -> float:
    return statistics.fmean(value for value, _ in runs)


def beyond_chance(compared: Sequence[Sequence[RunScore]]) -> float:
    """Share of the variance between methods' means that is not to be expected of equal methods.

    Args:
        compared: Each method's runs with different seeds; two methods or more, not all alike.

    Returns:
        0 to 1. Chance is that of the rows scored on, and of seeds as far as any method has several.
    """
    between = statistics.variance(map(_mean, compared))
    rows = statistics.fmean(error**2 for runs in compared for _, error in runs)
    of_seeds = [statistics.variance(v for v, _ in runs) for runs in compared if len(runs) > 1]
    seeds = statistics.fmean(of_seeds or [0.0]) * statistics.fmean(1 / len(r) for r in compared)
    return max(0.0, 1.0 - (rows + seeds) / between)


def _score_of(record: RunRecord) -> tuple[tuple[Any, ...], Setting, RunScore] | None:
    """What group a record belongs to, its settings but for the seed, and how it scored."""
    recipe = record.recipe
    trained = next((d.rows for d in record.data if d.split == "train"), 0)
    name = recipe["task"]["name"]
    known = name in registry.names("task")
    if record.outcome != "ok" or not known or not record.trained_on_all:
        return None
    cls: Any = registry.load("task", name)
    scores = record.quality(cls.metric)
    if not scores or recipe["method"]["name"] not in registry.names("method"):
        return None
    score = scores[0]
    asks: TaskKind = "classification" if cls.asks == "label" else "generation"
    key = (recipe["model"]["checkpoint"], name, score.split, score.metric, trained, asks,
           cls.metric not in cls.lower_is_better)  # fmt: skip
    setting = {k: v for k, v in recipe.items() if k not in ("loop", "budget", "schema")}
    loop = {k: v for k, v in recipe["loop"].items() if k != "seed"}
    return (
        key,
        (repr((setting, loop)), float(recipe["optimizer"]["lr"])),
        (score.value, score.stderr),
    )


def _unknown(one: Advice, model: str, sort: Kind, rows: int, kind: TaskKind) -> Iterator[str]:
    if not one.evidence:
        yield "no record and no comparison of it is at hand"
        return
    if not any(e.source == "records of this model" for e in one.evidence):
        yield f"no record of it on {model}"
    if not any(e.near for e in one.evidence):
        of = " of images" if sort == "vision" else ""
        yield f"nothing on {kind}{of} with about {rows:,} rows"
