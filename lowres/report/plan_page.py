"""A plan, a fit or a matrix as one self-contained HTML page: will it fit, why, what to change."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from lowres.core.plan import (
    CATEGORIES,
    PHASES,
    Candidate,
    Category,
    Cell,
    Change,
    Fit,
    Matrix,
    MemoryPlan,
)
from lowres.core.units import format_bytes, gib_to_bytes
from lowres.report import plan_plots, plots
from lowres.report.page import environment, write_html

TEMPLATE = "plan.html.j2"
_FAMILIES = ("task", "method", "freezing", "objective", "optimizer", "procedure")


@dataclass(frozen=True)
class Verdict:
    """The answer, before anything else of the page.

    Args:
        kind: `ok`, `bad`, or `open` where there is nothing to compare with.
        title: In two or three words.
        sentences: With the numbers.
    """

    kind: str
    title: str
    sentences: list[str]


def write_plan_page(item: MemoryPlan | Fit | Matrix, path: Path) -> None:
    """Write the page of a plan, a fit or a matrix.

    Args:
        path: Ends in `.html`; a page that is there already is replaced.

    Raises:
        InputError: When the path is no page's name or cannot be written.
    """
    write_html(render(item), path)


def render(item: MemoryPlan | Fit | Matrix) -> str:
    """The page as text. Equal items give equal text: it holds no date and no path of its own."""
    import lowres

    made = environment()
    made.filters |= {
        "ratio": lambda x: None if x is None else f"{x:.2f}x",
        "whole": lambda x: None if x is None else f"{x:,.0f}",
        "variable": plan_plots.variable,
        "arguments": _arguments,
        "setting": lambda pair: _inline(*pair),
    }
    if isinstance(item, MemoryPlan):
        shown: dict[str, Any] = {"kind": "plan", "plan": _plan(item), "verdict": verdict(item)}
    elif isinstance(item, Fit):
        shown = {"kind": "fit", **_fit(item)}
    else:
        shown = {"kind": "matrix", **_matrix(item)}
    categories = {plan_plots.variable(c): pair for c, pair in plan_plots.COLOURS.items()}
    return made.get_template(TEMPLATE).render(
        version=lowres.__version__, colours=plots.COLOURS | categories, item=item, **shown
    )


def verdict(plan: MemoryPlan) -> Verdict:
    """Whether the recipe fits, in words and numbers."""
    card, needed_bytes = plan.card, plan.needed_bytes
    host = _host(plan)
    if card is None or plan.fits is None:
        if card is not None and plan.host_fits is not None:
            return Verdict(
                "ok" if plan.host_fits else "bad", "Fits" if plan.host_fits else "Does not fit",
                [f"It runs on {card.name}, out of the host's memory.", host],
            )  # fmt: skip
        needs = f"The recipe needs {format_bytes(needed_bytes)} on its device."
        if card is None:
            needs += " Name a card, or set budget.device_gib, to learn whether it fits."
        title = "No card was given" if card is None else "No verdict"
        return Verdict("open", title, [needs, *([host] if plan.host_fits is False else [])])
    free_bytes = card.offered_bytes - needed_bytes
    needs = f"It needs {format_bytes(needed_bytes)}; {card.name} offers"
    needs += f" {format_bytes(card.offered_bytes)}:"
    if not plan.fits:
        sentences = [f"{needs} {format_bytes(-free_bytes)} are missing.", _way_out(plan.changes)]
        return Verdict("bad", "Does not fit", [s for s in sentences if s])
    sentences = [f"{needs} {format_bytes(free_bytes)} stay free."]
    narrow = plan.band_bytes > free_bytes
    if narrow:
        band = format_bytes(plan.band_bytes)
        sentences.append(f"The real peak may lie up to {band} higher, which is more than that.")
    if plan.host_fits is False:
        return Verdict("bad", "Fits the card, not the host", [*sentences, host])
    return Verdict("ok", "Fits narrowly" if narrow else "Fits", sentences)


def _way_out(changes: Sequence[Change]) -> str:
    """The change that makes it fit at the least cost of time."""
    fitting = [c for c in changes if c.fits and not c.problem]
    if not fitting:
        return "No single change of the ladder makes it fit." if changes else ""
    best = min(fitting, key=lambda c: (c.step_ratio or 1.0, c.needed_bytes or 0))
    cost = f", at {best.step_ratio:.2f}x the time of a step" if best.step_ratio else ""
    return f'With "{best.name}" it fits, needing {format_bytes(best.needed_bytes)}{cost}.'


def _host(plan: MemoryPlan) -> str:
    """Host memory in one sentence."""
    text = f"The process needs {format_bytes(plan.host_needed_bytes)} of the host's memory"
    if plan.disk_bytes:
        text += f", beside {format_bytes(plan.disk_bytes)} in files"
    budget = (plan.recipe.get("budget") or {}).get("host_gib")
    if budget is not None:
        bound = f"the budget of {format_bytes(gib_to_bytes(budget))}"
    else:
        bound = "what this machine has"
    if plan.host_fits is None:
        return text + "; without budget.host_gib there is nothing to hold that against."
    return text + (", within " if plan.host_fits else ", over ") + bound + "."


def _plan(plan: MemoryPlan) -> dict[str, Any]:
    """What the template shows of a plan beyond the plan itself."""
    phases = {p: plan.phases[p] for p in PHASES if p in plan.phases}
    in_phases = {c for p in phases.values() for c in p.categories}
    in_curve = set(plan.curve.categories) if plan.curve else set()
    levers = plan.recipe.get("levers") or []
    return {
        "of": plan,
        "phases": phases,
        "categories": _present(in_phases),
        "legend": _present(in_phases | in_curve),
        "allocator_bytes": plan_plots.allocator_bytes(plan),
        "offered_bytes": plan.card.offered_bytes if plan.card else None,
        "host": _host(plan),
        "model": _name(plan.recipe, "model", "checkpoint"),
        "part": {f: _name(plan.recipe, f) for f in _FAMILIES},
        "levers": [x.get("name") if isinstance(x, dict) else x for x in levers],
        "batch": _batch(plan.recipe.get("loop") or {}),
        "bars": _safe(plan_plots.phase_bars(plan, "phases")),
        "curve": _safe(plan_plots.update_curve(plan, "curve")),
        "step": _safe(plan_plots.step_bar(plan.step, "step") if plan.step else None),
    }


def _batch(loop: dict[str, Any]) -> str:
    """What an update sees, in words; empty where the recipe does not say."""
    micro, whole, length = map(loop.get, ("micro_batch_size", "global_batch_size", "max_length"))
    rows = f"micro-batches of {micro}" if micro else ""
    rows += f" with up to {length:,} tokens" if rows and length else ""
    return rows + (f", {whole} an update" if rows and whole else "")


def _present(found: set[Category]) -> list[Category]:
    return [c for c in CATEGORIES if c in found]


def _fit(fit: Fit) -> dict[str, Any]:
    chosen = None if fit.chosen is None else fit.candidates[fit.chosen]
    shared = _shared(fit.candidates)
    drawn = plan_plots.front(fit.candidates, fit.chosen, fit.card.offered_bytes, "front")
    return {
        "plan": _plan(fit.plan) if fit.plan else None,
        "chosen": chosen,
        "front": _safe(drawn),
        "shared": shared,
        "untimed": sum(c.seconds is None for c in fit.candidates),
        "verdict": _verdict_of_fit(fit, chosen),
    }


def _shared(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Settings that distinguish none of several candidates."""
    if len(candidates) < 2:
        return {}
    first, *others = (c.settings for c in candidates)
    return {k: v for k, v in first.items() if all(k in o and o[k] == v for o in others)}


def _verdict_of_fit(fit: Fit, chosen: Candidate | None) -> Verdict:
    offers = f"{fit.card.name}, which offers {format_bytes(fit.card.offered_bytes)}"
    if chosen is None:
        sentences = [f"None of {fit.considered:,} recipes fits {offers}."]
        if fit.candidates:
            least_bytes = min(c.needed_bytes for c in fit.candidates)
            sentences.append(f"The smallest needs {format_bytes(least_bytes)}.")
        return Verdict("bad", "Nothing fits", sentences)
    best = f"The best for {fit.goal} of {fit.considered:,} recipes weighed for {fit.card.name}."
    if fit.plan is not None:
        planned = verdict(fit.plan)
        return Verdict(planned.kind, planned.title, [best, *planned.sentences])
    text = f"It needs {format_bytes(chosen.needed_bytes)} on {offers}."
    return Verdict("ok", "Fits", [best, text])


def _matrix(matrix: Matrix) -> dict[str, Any]:
    """A table for each method, its longer side downwards; reasons of refusals are numbered."""
    cells = matrix.cells
    models = list(dict.fromkeys(c.model for c in cells))
    cards = list(dict.fromkeys(c.card for c in cells))
    turned = len(cards) > len(models)
    methods: dict[str, dict[tuple[str, str], Cell]] = {}
    for c in cells:
        place = (c.card, c.model) if turned else (c.model, c.card)
        methods.setdefault(c.method, {})[place] = c
    refused = [c for c in cells if c.problem]
    reasons = dict.fromkeys(c.problem for c in refused)
    judged = [c.fits for c in cells if not c.problem and c.needed_bytes is not None]
    told = {
        "do not fit": judged.count(False),
        "are refused": len(refused),
        "have no verdict": len(cells) - len(refused) - len(judged) + judged.count(None),
    }
    counts = [f"{n:,} {what}" for what, n in told.items() if n]
    title = f"{judged.count(True):,} of {len(cells):,} combinations of model, card and method fit"
    return {
        "verdict": Verdict("open", title, [f"{', '.join(counts)}."] if counts else []),
        "corner": "card" if turned else "model",
        "down": cards if turned else models,
        "across": models if turned else cards,
        "methods": methods,
        "reasons": {problem: number for number, problem in enumerate(reasons, start=1)},
    }


def _name(recipe: dict[str, Any], family: str, key: str = "name") -> str:
    part = recipe.get(family)
    return str(part.get(key, "-")) if isinstance(part, dict) else str(part or "-")


def _arguments(overrides: Sequence[str]) -> str:
    """As a shell takes them."""
    return " ".join(f"--set {shlex.quote(o)}" for o in overrides)


def _inline(key: str, value: Any) -> str:
    """A key of a recipe and its value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    line = text.strip().removesuffix("...").strip()  # with which YAML ends a lone word
    return f"{key}: {line}"


def _safe(svg: str | None) -> Markup | None:
    """Mark a figure as HTML; matplotlib has escaped the text inside it, `plots` its label."""
    return None if svg is None else Markup(svg)
