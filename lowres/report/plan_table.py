"""Plans as tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from lowres.core.plan import CATEGORIES, PHASES, Change, Curve, Fit, Matrix, MemoryPlan
from lowres.core.units import format_bytes, format_count, format_seconds
from lowres.report.table import console

_BARS = " ▁▂▃▄▅▆▇█"
_PLAIN_BARS = " .:-=+*%#"
CURVE_WIDTH = 72
LADDER = "What single changes would save and cost"


def print_plan(plan: MemoryPlan) -> None:
    """Verdict, peak by phase and category, one step over time, step time, assumptions."""
    out = console()
    out.print(verdict(plan))
    out.print(_phase_table(plan))
    peak = plan.peak
    where = f", in {peak.module}" if peak.module else ""
    out.print(
        f"the peak: {plan.peak_phase.replace('_', ' ')}, {peak.instant}{where} ({peak.operation})"
    )
    if plan.curve is not None and plan.curve.instants:
        top = format_bytes(max(_total(plan.curve)))
        bars = _BARS if out.encoding.startswith("utf") else _PLAIN_BARS
        out.print(f"{plan.steady}: {sparkline(plan.curve, bars=bars)}  (top: {top})")
    if plan.step is not None:
        s = plan.step
        parts = ", ".join(f"{k} {format_seconds(v)}" for k, v in s.parts.items())
        out.print(
            f"an update: about {format_seconds(s.seconds)} (between "
            f"{format_seconds(s.low_seconds)} and {format_seconds(s.high_seconds)}; {s.basis}), "
            f"{s.tokens_per_second:,.0f} tokens/s: {parts}"
        )
    else:
        out.print("an update: no time, for the rates of the device are not known (--gpu NAME)")
    out.print(
        f"parameters: {format_count(plan.trainable)} trained of {format_count(plan.total)}; "
        f"host memory: {format_bytes(plan.host_needed_bytes)}"
        + (f"; on disk: {format_bytes(plan.disk_bytes)}" if plan.disk_bytes else "")
    )
    out.print(
        f"shapes: {plan.shapes}; depth: {plan.depth}; planned in {plan.planning_seconds:.1f} s"
    )
    if plan.unknown:
        out.print(f"without a rule, so the band is wider: {', '.join(plan.unknown)}")
    for note in plan.notes:
        out.print(f"note: {note}")


def verdict(plan: MemoryPlan) -> str:
    """Whether it fits, in one sentence with its numbers."""
    needs = f"needs {format_bytes(plan.needed_bytes)}"
    band = f" (up to {format_bytes(plan.band_bytes)} more, by context and unknown operations)"
    if plan.card is None:
        return f"{needs}{band if plan.band_bytes else ''}; no card was named (--gpu, --device-gib)"
    if plan.card.kind == "cpu":
        fits = "" if plan.host_fits is not False else "; that does NOT fit this machine"
        return (
            f"{needs} for tensors on the CPU, {format_bytes(plan.host_needed_bytes)} in all{fits}"
        )
    if plan.host_fits is False:
        host = format_bytes(plan.host_needed_bytes)
        band += f"; the host memory it takes, {host}, is NOT there"
    offers = plan.card.offered_bytes
    left = offers - plan.needed_bytes
    if plan.fits:
        return f"fits {plan.card.name}: {needs}{band} of {format_bytes(offers)}, " + (
            f"{format_bytes(left)} left"
        )
    return f"does NOT fit {plan.card.name}: {needs}{band} of {format_bytes(offers)}, " + (
        f"{format_bytes(-left)} too much"
    )


def _phase_table(plan: MemoryPlan) -> Table:
    phases = [name for name in PHASES if name in plan.phases]
    table = Table("", *(name.replace("_", " ") for name in phases))
    for category in CATEGORIES:
        row = [plan.phases[name].categories.get(category) for name in phases]
        if any(row):
            table.add_row(category, *("" if not size else format_bytes(size) for size in row))
    table.add_section()
    for title, key in (
        ("live tensors", "live_bytes"),
        ("allocated", "allocated_bytes"),
        ("reserved", "reserved_bytes"),
        ("host tensors", "host_bytes"),
    ):
        sizes = [getattr(plan.phases[name], key) for name in phases]
        if any(sizes):
            table.add_row(title, *(format_bytes(size) if size else "" for size in sizes))
    return table


def sparkline(curve: Curve, width: int = CURVE_WIDTH, bars: str = _BARS) -> str:
    """Live bytes over a step in one line of bars, which go from low to high."""
    columns = len(curve.instants)
    total = _total(curve)
    most = max(total)
    out = []
    for i in range(min(width, columns)):
        piece = total[i * columns // width : max(1, (i + 1) * columns // width)] or [total[i]]
        out.append(bars[round(max(piece) / most * (len(bars) - 1))])
    return "".join(out)


def _total(curve: Curve) -> list[int]:
    return [sum(values) for values in zip(*curve.categories.values(), strict=True)]


def print_changes(changes: Sequence[Change], title: str) -> None:
    """The ladder; nothing when there is none."""
    if not changes:
        return
    table = Table("change", "saves", "then needs", "time of an update", "fits", "how", title=title)
    for change in changes:
        if change.problem is not None:
            table.add_row(change.name, "-", "-", "-", "-", f"not here: {change.problem}")
            continue
        ratio = "-" if change.step_ratio is None else f"x {change.step_ratio:.2f}"
        fits = {True: "yes", False: "no", None: "-"}[change.fits]
        how = " ".join(f"--set '{text}'" for text in change.overrides)
        saved, needed = format_bytes(change.saved_bytes), format_bytes(change.needed_bytes)
        table.add_row(change.name, saved, needed, ratio, fits, how)
    console().print(table)


def print_difference(a: MemoryPlan, b: MemoryPlan, names: tuple[str, str]) -> None:
    """Two plans by component, each at its own peak."""
    out = console()
    table = Table("", *names, "difference")
    for category in CATEGORIES:
        left, right = a.peak.categories.get(category, 0), b.peak.categories.get(category, 0)
        if left or right:
            table.add_row(category, *_three(left, right))
    table.add_section()
    for phase in PHASES:
        if phase in a.phases and phase in b.phases:
            sizes = (a.phases[phase].live_bytes, b.phases[phase].live_bytes)
            table.add_row(f"{phase.replace('_', ' ')} (live)", *_three(*sizes))
    table.add_row("needed", *_three(a.needed_bytes, b.needed_bytes))
    if a.step is not None and b.step is not None:
        ratio = b.step.seconds / a.step.seconds
        table.add_row(
            "an update", format_seconds(a.step.seconds), format_seconds(b.step.seconds),
            f"x {ratio:.2f}",
        )  # fmt: skip
    out.print(table)
    for name, plan in zip(names, (a, b), strict=True):
        out.print(f"{name}: {verdict(plan)}; the peak: {plan.peak.instant}")


def _three(left: int, right: int) -> tuple[str, str, str]:
    sign = "+" if right >= left else "-"
    return format_bytes(left), format_bytes(right), f"{sign}{format_bytes(abs(right - left))}"


def print_fit(fit: Fit) -> None:
    """The chosen recipe, the front, and what would fit where nothing does."""
    out = console()
    out.print(
        f"{fit.considered:,} recipes for {fit.model} on {fit.task}, {fit.card.name}, best "
        f"{fit.goal}; {fit.seconds:.0f} s"
    )
    keys = list(dict.fromkeys(key for c in fit.candidates for key in c.settings))
    table = Table("", *keys, "needs", "fits", "an update", "tokens/s", "quality", "approximate")
    for number, c in enumerate(fit.candidates):
        table.add_row(
            "->" if number == fit.chosen else "",
            *(str(c.settings.get(key, "")) for key in keys),
            format_bytes(c.needed_bytes),
            "yes" if c.fits else "no",
            format_seconds(c.seconds),
            "-" if c.tokens_per_second is None else f"{c.tokens_per_second:,.0f}",
            "unknown" if c.quality is None else f"{c.quality:.3f}",
            ", ".join(c.lossy) or "nothing",
        )
    out.print(table)
    if fit.plan is not None:
        out.print(verdict(fit.plan))
    else:
        out.print("nothing fits")
        print_changes(fit.instead, "What would")
    for note in fit.notes:
        out.print(f"note: {note}")


_VERDICTS = {True: "fits", False: "no", None: "needs"}


def print_matrix(matrix: Matrix) -> None:
    """What each model needs with each method, and on which cards that is there."""
    out = console()
    cards = list(dict.fromkeys(cell.card for cell in matrix.cells))
    table = Table("model", "method", *cards)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for cell in matrix.cells:
        told = "refused" if cell.problem else f"{_VERDICTS[cell.fits]}, "
        told += "" if cell.problem else format_bytes(cell.needed_bytes)
        rows.setdefault((cell.model, cell.method), {})[cell.card] = told
    for (model, method), by_card in rows.items():
        table.add_row(model, method, *(by_card.get(card, "") for card in cards))
    out.print(matrix.setting)
    out.print(table)
    for text in dict.fromkeys(f"{c.model}: {c.problem}" for c in matrix.cells if c.problem):
        out.print(text)
