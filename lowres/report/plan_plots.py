"""Figures of plans as SVG that is part of an HTML page, in the form of `plots`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lowres.core.plan import CATEGORIES, PHASES, Candidate, Category, MemoryPlan, StepPlan
from lowres.core.units import GIB, MIB, format_bytes, format_seconds
from lowres.report import plots

COLOURS: dict[Category, tuple[str, str]] = {
    "weights": ("#3a6390", "#6c9fd4"),
    "quantisation state": ("#84a9cd", "#44719f"),
    "adapters": ("#1c8068", "#4dbd9b"),
    "gradients": ("#c2543e", "#ee8b74"),
    "optimizer states": ("#dda23f", "#e9c46f"),
    "activations": ("#7a57a3", "#ab8ed8"),
    "logits": ("#cb86b3", "#e0a6ce"),
    "temporaries": ("#87952f", "#b6c45c"),
    "workspaces": ("#777d86", "#9097a0"),
    "batch": ("#2c3844", "#d3d9df"),
}
"""Category to its value on a light and on a dark page; neighbours differ in lightness, too."""

_INK, _MUTED, _PLAN, _LINE = (plots.COLOURS[k][0] for k in ("ink", "muted", "live", "reserved"))
_PARTS = {
    "matrix products": "live", "attention": "process", "memory traffic": "allocated",
    "launches": "resident", "transfers": "reserved",
}  # fmt: skip
_LETTER = 0.018
"""Of the width: a stage of the update with less for each letter has no room for its name."""


def variable(category: Category) -> str:
    """The name of a category's colour in the page's style sheet."""
    return category.replace(" ", "-")


def allocator_bytes(plan: MemoryPlan) -> int:
    """Of the need, what is neither tensors nor context: the allocator's rounding and gaps."""
    context_bytes = plan.card.context_bytes if plan.card else 0
    return plan.needed_bytes - plan.peak.live_bytes - context_bytes


def phase_bars(plan: MemoryPlan, key: str) -> str | None:
    """What is alive at the peak of each phase, with the card's line; None without phases.

    Args:
        key: Differs between the figures of a page; ids inside the SVG are made from it.
    """
    phases = [p for p in PHASES if p in plan.phases]
    if not phases:
        return None
    room_bytes = _room_bytes(plan)
    unit, unit_name = _unit([*(plan.phases[p].live_bytes for p in phases), room_bytes or 0])
    gaps, room = max(0, allocator_bytes(plan)) / unit, (room_bytes or 0) / unit

    def draw(axes: Any) -> None:
        ends = [0.0] * len(phases)
        for c in CATEGORIES:
            widths = [plan.phases[p].categories.get(c, 0) / unit for p in phases]
            if any(widths):
                axes.barh(range(len(phases)), widths, 0.68, left=ends, color=COLOURS[c][0])
                ends = [a + w for a, w in zip(ends, widths, strict=True)]
        row = phases.index(plan.peak_phase)
        axes.barh([row], [gaps], 0.68, left=ends[row], color="none", edgecolor=_INK, linewidth=0.8)
        ends[row] += gaps
        texts = [_number(plan.phases[p].live_bytes / unit) for p in phases]
        texts[row] += f" + {_number(gaps)}" if gaps else ""
        width = 1.05 * max(*ends, room, 1e-9)
        for _ in range(3):  # a text that would lie on the card's line stands behind it
            shares = [0.026 * len(text) for text in texts]
            starts = [
                room if end <= room < end + share * width else end
                for end, share in zip(ends, shares, strict=True)
            ]
            width = max(width, *(s / (1 - share) for s, share in zip(starts, shares, strict=True)))
        for i, (start, text) in enumerate(zip(starts, texts, strict=True)):
            axes.annotate(
                text, (start, i), xytext=(4, 0), textcoords="offset points", va="center",
                color=_INK if i == row else _MUTED, fontweight="bold" if i == row else "normal",
            )  # fmt: skip
        if room_bytes is not None:
            text = f"room for tensors: {format_bytes(room_bytes)}"
            _card_line(axes, room, text, to_the_left=room >= 0.5 * max(ends))
        axes.set_yticks(range(len(phases)), [p.replace("_", " ") for p in phases])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlim(0, width)
        axes.set_xlabel(f"live tensors at the phase's peak, {unit_name}")

    label = f"Live tensors at the peak of each phase by category, {unit_name}"
    return _svg(draw, key, label, height=0.9 + 0.34 * len(phases))


def update_curve(plan: MemoryPlan, key: str) -> str | None:
    """Live bytes over the steady updates that were looked at, stacked; None without a curve."""
    curve = plan.curve
    if curve is None or not curve.instants or not curve.categories:
        return None
    shown = [c for c in CATEGORIES if c in curve.categories]
    sums = [sum(at) for at in zip(*(curve.categories[c] for c in shown), strict=True)]
    peak_bytes = max(sums)
    peak_at = sums.index(peak_bytes)
    unit, unit_name = _unit(sums)
    room_bytes = _room_bytes(plan)

    def draw(axes: Any) -> None:
        heights = [[b / unit for b in curve.categories[c]] for c in shown]
        axes.stackplot(
            range(len(sums)), heights, colors=[COLOURS[c][0] for c in shown], linewidth=0
        )
        # Most of a frozen model never changes: from zero, the part that does would be a thin band.
        bottom = 0.9 * min(curve.categories[shown[0]]) / unit
        bottom = math.floor(bottom) if bottom > 0.6 * peak_bytes / unit else 0
        top = peak_bytes / unit + 0.18 * (peak_bytes / unit - bottom)
        # A line far above would flatten what the figure is about; the bars beside it have it.
        if room_bytes is not None and room_bytes <= 1.6 * peak_bytes:
            axes.axhline(room_bytes / unit, color=_LINE, linewidth=1.4, linestyle="--")
            top = max(top, room_bytes / unit + 0.06 * (room_bytes / unit - bottom))
        axes.plot([peak_at], [peak_bytes / unit], "o", color=_INK, markersize=3.5)
        right = peak_at > 0.6 * len(sums)
        axes.annotate(
            f"peak {format_bytes(peak_bytes)}", (peak_at, peak_bytes / unit),
            xytext=(-5 if right else 5, 3), textcoords="offset points",
            ha="right" if right else "left", fontweight="bold",
        )  # fmt: skip
        starts, named = _stages(curve.instants)
        for at in starts:
            axes.axvline(at, color=_MUTED, linewidth=0.6, linestyle=":")
        axes.set_xticks([at for at, _ in named], [name for _, name in named])
        axes.tick_params(axis="x", length=0)
        axes.grid(False, axis="x")
        axes.set_xlim(0, max(1, len(sums) - 1))
        axes.set_ylim(bottom, max(top, 1e-9))
        axes.set_ylabel(f"live tensors, {unit_name}{f', from {bottom}' if bottom else ''}")
        axes.set_xlabel(f"{plan.steady}, in the order of its allocations")

    label = f"Live tensors over {plan.steady}, peak {format_bytes(peak_bytes)}"
    return _svg(draw, key, label, height=2.94)


def _room_bytes(plan: MemoryPlan) -> int | None:
    """The card's line: what tensors may fill; None where nothing is held against it."""
    return None if plan.card is None or plan.fits is None else plan.card.available_bytes


def _stages(instants: Sequence[str]) -> tuple[list[int], list[tuple[float, str]]]:
    """Where the stages of an update begin, and the middle and name of each that has room for it.

    A backward pass with recomputation in it is one stage.
    """
    names = [re.split(r" of |:", i)[0].replace("recomputation", "backward") for i in instants]
    starts, named, at = [], [], 0
    for name, run in groupby(names):
        n = len(list(run))
        if at:
            starts.append(at)
        if n >= _LETTER * len(name) * len(names):
            named.append((at + (n - 1) / 2, name))
        at += n
    return starts, named


def step_bar(step: StepPlan, key: str) -> str | None:
    """Seconds of one update by what they go to, with the band; None without parts."""
    parts = {name: s for name, s in step.parts.items() if s > 0 and math.isfinite(s)}
    if not parts:
        return None

    def draw(axes: Any) -> None:
        left = 0.0
        for name, seconds in parts.items():
            colour = plots.COLOURS[_PARTS.get(name, "muted")][0]
            axes.barh([0], [seconds], 0.6, left=left, color=colour, label=name)
            left += seconds
        low, high = step.seconds - step.low_seconds, step.high_seconds - step.seconds
        axes.errorbar(
            [step.seconds], [0.55], xerr=[[max(0, low)], [max(0, high)]], color=_INK, marker="|",
            markersize=9, capsize=4, elinewidth=1.1,
        )  # fmt: skip
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylim(-0.4, 0.95)
        axes.set_xlim(0, 1.04 * max(left, step.high_seconds))
        axes.set_xlabel("seconds of one update; the line is the band")
        axes.figure.legend(loc="outside upper left", ncols=3)

    label = f"Planned seconds of one update: {format_seconds(step.seconds)}"
    return _svg(draw, key, label, height=1.5)


def front(
    candidates: Sequence[Candidate], chosen: int | None, room_bytes: int, key: str
) -> str | None:
    """Memory against seconds of an update; None where no candidate's time is known.

    Args:
        candidates: They carry their place in the sequence, from 1. Filled where quality is known.
        room_bytes: The card's line.
    """
    timed = [
        (number, c.needed_bytes, c.seconds, c.quality is not None)
        for number, c in enumerate(candidates, start=1)
        if c.seconds is not None and math.isfinite(c.seconds) and c.seconds > 0
    ]
    if not timed:
        return None
    unit, unit_name = _unit([room_bytes, *(b for _, b, _, _ in timed)])

    def draw(axes: Any) -> None:
        x, y = [b / unit for _, b, _, _ in timed], [s for _, _, s, _ in timed]
        for (number, _, _, known), a, b in zip(timed, x, y, strict=True):
            mine = number - 1 == chosen
            axes.plot(
                [a], [b], "D" if mine else "o", markersize=8 if mine else 5.5, color=_PLAN,
                markerfacecolor=_PLAN if known else "none",
            )  # fmt: skip
        if min(y) * 10 < max(y):
            axes.set_yscale("log")
        room, middle = room_bytes / unit, (max(x) + min(x)) / 2
        _card_line(axes, room, f"the card: {format_bytes(room_bytes)}", to_the_left=room > middle)
        axes.margins(0.12)
        axes.set_xlabel(f"needed, {unit_name}")
        axes.set_ylabel("seconds of one update")
        _labels(axes, [(str(n), a, b) for (n, *_), a, b in zip(timed, x, y, strict=True)])

    label = f"Seconds of one update against memory needed, {len(timed)} recipes"
    return _svg(draw, key, label, height=3.2)


def _card_line(axes: Any, x: float, text: str, to_the_left: bool) -> None:
    axes.axvline(x, color=_LINE, linewidth=1.4, linestyle="--")
    axes.annotate(
        text, (x, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
        textcoords="offset points", ha="right" if to_the_left else "left", color=_MUTED,
    )  # fmt: skip


def _labels(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """A text beside each point, on the nearest side where no point or text is already."""
    axes.figure.draw_without_rendering()  # settles the layout, on which places in points rest
    scale = 72 / axes.figure.dpi
    places = [axes.transData.transform((x, y)) * scale for _, x, y in points]
    taken = [(x, y, 4.0, 4.0) for x, y in places]  # centres and half extents
    turns = [
        (step * math.cos(turn), step * math.sin(turn))
        for step in (1, 1.6, 2.2, 3, 4)
        for turn in (0.7, 2.4, -0.7, -2.4, 1.57, -1.57, 0, 3.14)
    ]
    for (text, x, y), (at_x, at_y) in zip(points, places, strict=True):
        wide, high = 3.3 * len(text) + 0.5, 5.5  # of bold digits of 9 points
        boxes = [(at_x + a * (wide + 5), at_y + b * 10, wide, high) for a, b in turns]
        box = next((box for box in boxes if not any(_meet(box, o) for o in taken)), boxes[0])
        taken.append(box)
        axes.annotate(
            text, (x, y), xytext=(box[0] - at_x, box[1] - at_y), textcoords="offset points",
            ha="center", va="center", fontweight="bold",
        )  # fmt: skip


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return abs(a[0] - b[0]) < a[2] + b[2] and abs(a[1] - b[1]) < a[3] + b[3]


def _unit(sizes: Sequence[int]) -> tuple[int, str]:
    return (GIB, "GiB") if max(sizes) >= GIB else (MIB, "MiB")


def _number(value: float) -> str:
    return f"{value:.2f}" if value >= 0.005 or value == 0 else "< 0.01"


def _svg(draw: Any, key: str, label: str, height: float) -> str:
    """As `plots` draws, with the colours of the categories; a dollar is a dollar."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        svg = plots._svg(draw, key, label, height)
    for category, (light, _) in COLOURS.items():
        svg = re.sub(rf"(: ?){light}\b", rf"\1var(--{variable(category)}, {light})", svg)
    return svg
