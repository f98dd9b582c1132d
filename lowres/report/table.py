"""A record as a table in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lowres.core.record import RunRecord
from lowres.core.units import format_bytes, format_count, format_seconds


def print_record(record: RunRecord) -> None:
    """Scores beside memory and time, in that order."""
    console = Console(highlight=False, soft_wrap=True)
    measured = record.measured
    console.print(f"{record.id}: {record.outcome}" + (f" ({record.error})" if record.error else ""))
    _scores(console, record)
    table = Table("phase", "live tensors", "allocated", "reserved", "process", "resident", "time")
    for name, m in measured.phases.items():
        table.add_row(
            name.replace("_", " "),
            *(format_bytes(b) for b in (m.live_bytes, m.allocated_bytes, m.reserved_bytes,
                                        m.process_bytes, m.resident_bytes)),
            format_seconds(m.seconds),
        )  # fmt: skip
    console.print(table)
    if measured.step_time is not None:
        t = measured.step_time
        console.print(
            f"update: {format_seconds(t.p50_seconds)} median (p20 {format_seconds(t.p20_seconds)}, p80 "
            f"{format_seconds(t.p80_seconds)}, n={t.n}), {t.tokens_per_second:,.0f} tokens/s"
        )
    if measured.parameters is not None:
        p = measured.parameters
        console.print(
            f"parameters: {format_count(p.trainable)} trained of {format_count(p.total)}; saved "
            f"{format_bytes(measured.saved_bytes)}, checkpoint {format_bytes(measured.checkpoint_bytes)}"
        )
    if record.losses:
        console.print(
            f"loss: {record.losses[0]:.4f} -> {record.losses[-1]:.4f} in {len(record.losses)} updates, "
            f"{format_seconds(record.seconds)} in all"
        )
    for event in record.events:
        console.print(f"event after update {event.step}: {event.kind}: {event.text}", markup=False)


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
