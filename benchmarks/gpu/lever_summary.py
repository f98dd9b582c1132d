"""The records of the levers' GPU suite in tables: bytes saved, time added, losses kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.summary import read
from lowres.core.plan import MemoryPlan
from lowres.core.units import format_bytes

HEADER = (
    "recipe", "cap", "came to", "planned peak", "measured peak", "plain peak", "reserved",
    "process", "update", "beside plain",
)  # fmt: skip
PHASES = ("first_step", "steady_steps")
COMPARED = 2
"""Updates whose losses are compared: the second one sees the first one's weights."""


def beside(record: dict[str, Any], plain: dict[str, Any], tolerance: float | None) -> Any:
    """What of the plain recipe's record belongs into the one that it was run beside.

    Args:
        tolerance: Relative, of losses that must be those of the plain recipe.
    """
    told: dict[str, Any] = {key: plain[key] for key in ("outcome", "error", "started", "losses")}
    told |= {"phases": plain["measured"]["phases"], "step_time": plain["measured"]["step_time"]}
    if tolerance is not None:
        ours, theirs = record["losses"][:COMPARED], plain["losses"][:COMPARED]
        whole = len(ours) == len(theirs) == COMPARED
        apart = [abs(a / b - 1) for a, b in zip(ours, theirs, strict=False)]
        told["parity"] = {
            "tolerance": tolerance, "apart": max(apart, default=None),
            "holds": max(apart) <= tolerance if whole else None,
        }  # fmt: skip
    return told


def report(folder: Path) -> str:
    """Everything that the records of a folder tell, as Markdown."""
    records = read(folder)
    if not records:
        return f"no records in {folder}"
    compared = [r for r in records if "parity" in (r["suite"].get("beside") or {})]
    others = [r for r in records if r not in compared]
    lines = [_table(HEADER, [_row(r) for r in others]), ""] if others else []
    if compared:
        header = ("losses of two updates", "largest difference", "tolerance", "holds")
        lines += [_table(header, [_parity(r) for r in compared]), ""]
    failed = [r for r in records if r["outcome"] not in ("ok", "oom")]
    if failed:
        lines += ["Neither ran nor ran out of memory:"]
        lines += [f"- {r['id']}: {r['outcome']}: {r['error']}" for r in failed]
    return "\n".join(lines).rstrip()


def planned(plan: MemoryPlan | None) -> str | None:
    """A plan in one line."""
    if plan is None:
        return None
    peak = plan.peak
    made = sorted(peak.categories.items(), key=lambda item: -item[1])[:5]
    card = plan.card
    offered = "" if card is None else f" of {format_bytes(card.available_bytes)} on {card.name}"
    context = card.context_bytes if card is not None else 0
    verdict = {True: "fits", False: "does not fit", None: "no card"}[plan.fits]
    return (
        f"{verdict}: {format_bytes(plan.needed_bytes - context)}{offered}; "
        f"{plan.peak_phase}, {peak.instant}: "
        + ", ".join(f"{name} {format_bytes(size)}" for name, size in made)
    )


def _row(record: dict[str, Any]) -> list[str]:
    other = record["suite"].get("beside") or {}
    own_time, plain_time = record["measured"]["step_time"], other.get("step_time")
    cap = record["suite"].get("capacity_bytes")
    ratio = own_time and plain_time and own_time["p50_seconds"] / plain_time["p50_seconds"]
    phases = record["measured"]["phases"]
    return [
        _name(record),
        _size(cap),
        record["outcome"],
        _size(peak((record["plan"] or {}).get("phases") or {})),
        _size(peak(phases)),
        _size(peak(other.get("phases") or {})),
        _size(_largest(phases, "reserved_bytes")),
        _size(_largest(phases, "process_bytes")),
        f"{own_time['p50_seconds']:.3f} s" if own_time else "-",
        f"x {ratio:.2f}" if ratio else "-",
    ]


def peak(phases: dict[str, Any]) -> int | None:
    """Of the updates: blocks in use where there is an allocator, live tensors on a CPU."""
    return _largest(phases, "allocated_bytes") or _largest(phases, "live_bytes")


def _largest(phases: dict[str, Any], key: str) -> int | None:
    found = [phases[name][key] for name in PHASES if name in phases and phases[name][key]]
    return max(found, default=None)


def _parity(record: dict[str, Any]) -> list[str]:
    found = record["suite"]["beside"]["parity"]
    apart, holds = found["apart"], found["holds"]
    return [
        _name(record), "-" if apart is None else f"{apart:.1e}", f"{found['tolerance']:.0e}",
        {True: "yes", False: "NO", None: "did not run"}[holds],
    ]  # fmt: skip


def _name(record: dict[str, Any]) -> str:
    """The id without the moment."""
    name: str = record["id"]
    stem, _, end = name.rpartition("-")
    return stem if stem and end[:8].isdigit() else name


def _size(size: int | None) -> str:
    return "-" if size is None else format_bytes(size)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    ruler = ["---", *(["--:"] * (len(header) - 1))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ruler, *rows])
