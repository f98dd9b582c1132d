"""Records as tables in the terminal: one in full, several side by side."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from rich import box
from rich.console import Console
from rich.table import Table

from lowres.core.record import RunRecord, Score
from lowres.core.units import format_bytes, format_count, format_seconds

PIPED_WIDTH = 200
"""Columns when output is no terminal: a file has room, and folded cells are hard to search."""


def print_record(record: RunRecord) -> None:
    """Scores beside memory and time, in that order."""
    out = console()
    measured = record.measured
    out.print(f"{record.id}: {record.outcome}" + (f" ({record.error})" if record.error else ""))
    _scores(out, record)
    table = Table(
        "phase", "planned", "live tensors", "allocated", "reserved", "process", "resident", "time"
    )
    for name, m in measured.phases.items():
        table.add_row(
            name.replace("_", " "),
            format_bytes(planned_bytes(record, name)),
            *(format_bytes(b) for b in (m.live_bytes, m.allocated_bytes, m.reserved_bytes,
                                        m.process_bytes, m.resident_bytes)),
            format_seconds(m.seconds),
        )  # fmt: skip
    out.print(table)
    if measured.step_time is not None:
        t = measured.step_time
        out.print(
            f"update: {format_seconds(t.p50_seconds)} median (p20 {format_seconds(t.p20_seconds)}, "
            f"p80 {format_seconds(t.p80_seconds)}, n={t.n}), {t.tokens_per_second:,.0f} tokens/s"
        )
    if measured.parameters is not None:
        p = measured.parameters
        out.print(
            f"parameters: {format_count(p.trainable)} trained of {format_count(p.total)}; "
            f"saved {format_bytes(measured.saved_bytes)}, "
            f"checkpoint {format_bytes(measured.checkpoint_bytes)}"
        )
    if record.losses:
        out.print(
            f"loss: {record.losses[0]:.4f} -> {record.losses[-1]:.4f} "
            f"in {len(record.losses)} updates, {format_seconds(record.seconds)} in all"
        )
    for event in record.events:
        out.print(f"event after update {event.step}: {event.kind}: {event.text}")


def planned_bytes(record: RunRecord, phase: str) -> int | None:
    """What was planned for a phase: allocated bytes on CUDA, live ones on a CPU."""
    planned: dict[str, int | None] = (record.plan or {}).get("phases", {}).get(phase, {})
    return planned.get("allocated_bytes") or planned.get("live_bytes")


def print_comparison(records: Sequence[RunRecord]) -> None:
    """One row a record, and under the table the error of each that failed."""
    out = console()
    header, rows = comparison(records)
    table = Table(box=box.SIMPLE)
    for i, name in enumerate(header):
        table.add_column(name, overflow="fold", justify="left" if 0 < i < 4 else "right")
    for row in rows:
        table.add_row(*row)
    out.print(table)
    for number, record in enumerate(records, start=1):
        if record.error:
            out.print(f"{number}: {record.outcome}: {record.error}")


def comparison(records: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: number, id, method, outcome, the main metric of each split, costs."""
    columns = list(dict.fromkeys((s.split, s.metric) for r in records for s in main_scores(r)))
    header = ["#", "id", "method", "outcome", *(f"{split} {metric}" for split, metric in columns)]
    header += ["peak live bytes", "peak resident bytes", "p50 step time", "trainable parameters"]
    rows = []
    for number, r in enumerate(records, start=1):
        found = {(s.split, s.metric): s for s in main_scores(r)}
        m = r.measured
        rows.append([
            str(number), r.id, part_name(r, "method"), r.outcome,
            *(format_score(found.get(column)) for column in columns),
            format_bytes(m.peak_live_bytes), format_bytes(m.peak_resident_bytes),
            format_seconds(m.step_time.p50_seconds if m.step_time else None),
            format_count(m.parameters.trainable) if m.parameters else "-",
        ])  # fmt: skip
    return header, rows


def main_scores(record: RunRecord) -> list[Score]:
    """The first metric of each split in the last evaluation; tasks put their main metric first."""
    first: dict[str, Score] = {}
    for s in record.final_scores():
        first.setdefault(s.split, s)
    return list(first.values())


def format_score(score: Score | None) -> str:
    return "-" if score is None else f"{score.value:.4f} ± {score.stderr:.4f}"


def part_name(record: RunRecord, family: str) -> str:
    """The part a record's recipe names for a family; `-` when it names none."""
    part = record.recipe.get(family)
    return str(part.get("name", "-")) if isinstance(part, dict) else str(part or "-")


def console() -> Console:
    # Markup off: an error or a recipe may hold [brackets], which are words here and not styles.
    out = sys.stdout
    if isinstance(out, TextIOWrapper) and not out.encoding.lower().startswith("utf"):
        out.reconfigure(errors="replace")
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False, width=wide)


def _scores(console: Console, record: RunRecord) -> None:
    if not record.scores:
        return
    table = Table("split", "metric", "value", "standard error", "majority", "n")
    for s in record.final_scores():
        table.add_row(
            s.split, s.metric, f"{s.value:.4f}", f"{s.stderr:.4f}",
            "-" if s.majority is None else f"{s.majority:.4f}", str(s.n),
        )  # fmt: skip
    console.print(table)
