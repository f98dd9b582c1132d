"""Figures of records as SVG that is part of an HTML page.

Text stays text (selectable, and in the page's font), and every colour is a variable of the page's
style sheet with the light value as its fallback: figures follow light and dark mode.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from lowres.core.record import PhaseMemory, RunRecord, Score
from lowres.core.units import GIB, MIB

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "ink": ("#1f2933", "#e4e7eb"),
    "muted": ("#64707d", "#9aa5b1"),
    "rule": ("#d5dae0", "#3a444f"),
    "live": ("#2b6a99", "#6db1e0"),
    "allocated": ("#2f8f83", "#5cc4b4"),
    "reserved": ("#c98a1b", "#e6b552"),
    "process": ("#8a5a9e", "#bb93cc"),
    "resident": ("#8b93a1", "#8b95a5"),
}
"""Name to its value on a light and on a dark page. Light values must differ: SVG has only them."""

MEMORY_KINDS = ("live", "allocated", "reserved", "process", "resident")
SMOOTHED_FROM = 50
"""Longer loss curves get a smoothed line; shorter ones can be followed by eye."""

_INK, _MUTED, _RULE = (COLOURS[k][0] for k in ("ink", "muted", "rule"))
_SERIES = [COLOURS[k][0] for k in ("live", "reserved", "allocated", "process", "resident")]
_WIDTH_INCHES = (
    4.6  # About a phone's width at this font size, so that the text stays readable there.
)
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": _INK,
}


@dataclass(frozen=True)
class Point:
    """One record in `scatter`, under its number in the comparison table."""

    number: int
    live_bytes: int
    score: Score


def loss_curve(record: RunRecord, key: str) -> str | None:
    """Loss of each update, with a moving mean when there are many; None without losses.

    Args:
        key: Differs between the figures of a page; ids inside the SVG are made from it.
    """
    n = len(record.losses)
    if not n:
        return None
    updates = range(1, n + 1)

    def draw(axes: Any) -> None:
        single = {"marker": "o"} if n == 1 else {}
        if n > SMOOTHED_FROM:
            window = min(101, max(5, n // 20) | 1)
            axes.plot(
                updates, record.losses, color=_MUTED, alpha=0.45, linewidth=0.7, label="update"
            )
            smooth = smoothed(record.losses, window)
            axes.plot(updates, smooth, color=_SERIES[0], linewidth=1.6, label=f"mean of {window}")
            axes.legend()
        else:
            axes.plot(updates, record.losses, color=_SERIES[0], linewidth=1.4, **single)
        axes.set_xlabel("update")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("loss")

    label = f"Loss by update: {record.losses[0]:.4f} at first, {record.losses[-1]:.4f} at last"
    return _svg(draw, key, label, height=2.7)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Centred moving mean; the odd window shrinks at the ends, what is not finite is left out."""
    half = window // 2
    out = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        out.append(sum(near) / len(near) if near else math.nan)
    return out


def scores_by_step(record: RunRecord, key: str) -> str | None:
    """The main metric of each split over the evaluations; None when there was only one."""
    if len({s.step for s in record.scores}) < 2:
        return None
    curves: dict[str, dict[int, Score]] = {}
    for s in record.scores:
        # The main metric is the first of its split in each evaluation.
        curves.setdefault(s.split, {}).setdefault(s.step, s)

    def draw(axes: Any) -> None:
        for i, (split, by_step) in enumerate(curves.items()):
            axes.errorbar(
                list(by_step),
                [s.value for s in by_step.values()],
                yerr=[s.stderr for s in by_step.values()],
                color=_SERIES[i % len(_SERIES)],
                marker="o", markersize=3, linewidth=1.4, elinewidth=0.8, label=split,
            )  # fmt: skip
        axes.set_xlabel("update")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(", ".join(_metrics(curves)))
        axes.legend()

    return _svg(draw, key, f"Scores by update on {', '.join(curves)}", height=2.7)


def _metrics(curves: dict[str, dict[int, Score]]) -> list[str]:
    return list(dict.fromkeys(s.metric for by_step in curves.values() for s in by_step.values()))


def memory_bars(record: RunRecord, key: str) -> str | None:
    """Peaks of each phase as bars, a colour for each kind of bytes; None without peaks."""
    phases = record.measured.phases
    kinds = [k for k in MEMORY_KINDS if any(kind_bytes(m, k) is not None for m in phases.values())]
    if not kinds:
        return None
    largest = max(kind_bytes(m, k) or 0 for m in phases.values() for k in kinds)
    unit, unit_name = (GIB, "GiB") if largest >= GIB else (MIB, "MiB")
    thick = 0.84 / len(kinds)

    def draw(axes: Any) -> None:
        for i, kind in enumerate(kinds):
            at, widths = [], []
            for row, memory in enumerate(phases.values()):
                size = kind_bytes(memory, kind)
                if size is not None:
                    at.append(row - 0.42 + (i + 0.5) * thick)
                    widths.append(size / unit)
            bars = axes.barh(at, widths, thick * 0.9, color=COLOURS[kind][0], label=f"{kind} bytes")
            texts = [f"{w:.2f}" if w >= 0.005 else "< 0.01" for w in widths]
            axes.bar_label(bars, texts, padding=2, fontsize=7.5, color=_MUTED)
        axes.set_yticks(range(len(phases)), [p.replace("_", " ") for p in phases])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.margins(x=0.14)
        axes.set_xlabel(f"peak, {unit_name}")
        axes.figure.legend(loc="outside upper left", ncols=min(3, len(kinds)))

    height = 1.0 + len(phases) * max(0.3, 0.19 * len(kinds))
    return _svg(draw, key, f"Peak memory by phase in {unit_name}", height=height)


def kind_bytes(memory: PhaseMemory, kind: str) -> int | None:
    found: int | None = getattr(memory, f"{kind}_bytes")
    return found


def scatter(points: Sequence[Point], key: str) -> str:
    """Score against peak of live bytes; points carry their record's number."""
    unit, unit_name = (GIB, "GiB") if max(p.live_bytes for p in points) >= GIB else (MIB, "MiB")
    first = points[0].score

    def draw(axes: Any) -> None:
        for p in points:
            x, y = p.live_bytes / unit, p.score.value
            axes.errorbar(x, y, yerr=p.score.stderr, color=_SERIES[0], marker="o", elinewidth=0.8)
            axes.annotate(
                str(p.number), (x, y), xytext=(5, 4), textcoords="offset points", fontweight="bold"
            )
        # Runs on different samples of a split have different baselines: no one line stands for all.
        (majority, *others) = {p.score.majority for p in points}
        if majority is not None and not others:
            axes.axhline(majority, color=_MUTED, linewidth=0.9, linestyle="--", label="majority")
            axes.legend()
        axes.margins(0.12)
        axes.set_xlabel(f"peak of live bytes, {unit_name}")
        axes.set_ylabel(f"{first.metric}, {first.split}")

    label = f"{first.metric} on {first.split} against peak of live bytes, {len(points)} records"
    return _svg(draw, key, label, height=3.0)


def _svg(draw: Any, key: str, label: str, height: float) -> str:
    """Draw on fresh axes and give the `<svg>` element alone."""
    import io

    import matplotlib
    from matplotlib import figure

    # Not pyplot: it keeps global state, and chooses a backend that may want a display.
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": key}):
        drawing: Figure = figure.Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
        draw(drawing.subplots())
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawing.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _for_page(file.getvalue(), label)


def _for_page(text: str, label: str) -> str:
    """Drop what does not belong inside a page, and let its style sheet choose colours and font."""
    svg = text[text.index("<svg") :]
    # Hashed ids come from the key and are unique; matplotlib's plain ones (figure_1) would repeat.
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    for name, (light, _) in COLOURS.items():
        svg = re.sub(rf"(: ?){light}\b", rf"\1var(--{name}, {light})", svg)
    attributes = f'<svg role="img" aria-label="{escape(label)}" '
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg ", attributes, 1)
