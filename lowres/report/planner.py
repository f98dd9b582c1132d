"""How far plans were from what was measured: the error distribution over records."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from lowres.core.record import RunRecord
from lowres.report.table import console


@dataclass(frozen=True)
class Error:
    """One phase of one run.

    Args:
        kind: Which bytes: `live` tensors or blocks `allocated` by CUDA's allocator.
        share: Predicted over measured, less one: positive where too much was planned.
    """

    record: str
    device: str
    phase: str
    kind: str
    predicted_bytes: int
    measured_bytes: int

    @property
    def share(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1


def errors(records: Sequence[RunRecord]) -> list[Error]:
    """Every phase that was both planned and measured, and `peak`, the largest over the phases."""
    out = []
    for record in records:
        planned = (record.plan or {}).get("phases", {})
        device = str(record.environment.get("device", "cpu"))
        of_run: dict[str, list[Error]] = {"allocated": [], "live": []}
        for phase, memory in record.measured.phases.items():
            for kind, found in of_run.items():
                predicted = planned.get(phase, {}).get(f"{kind}_bytes")
                measured = getattr(memory, f"{kind}_bytes")
                if predicted and measured:
                    found.append(Error(record.id, device, phase, kind, predicted, measured))
        found = of_run["allocated"] or of_run["live"]
        if found:
            predicted = max(e.predicted_bytes for e in found)
            measured = max(e.measured_bytes for e in found)
            out.append(Error(record.id, device, "peak", found[0].kind, predicted, measured))
            out += found
    return out


def distribution(found: Sequence[Error]) -> list[tuple[str, ...]]:
    """A row for each device, kind and phase: n, exact, median, 95th percentile, worst, below."""
    groups: dict[tuple[str, str, str], list[Error]] = {}
    for error in found:
        groups.setdefault((error.device, error.kind, error.phase), []).append(error)
    rows: list[tuple[str, ...]] = []
    for (device, kind, phase), members in groups.items():
        sizes = sorted(abs(e.share) for e in members)
        exact = sum(e.predicted_bytes == e.measured_bytes for e in members)
        worst = max(members, key=lambda e: abs(e.share)).share
        low = sum(e.share < 0 for e in members)
        at_95 = sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))]
        rows.append((
            device, kind, phase.replace("_", " "), str(len(members)),
            f"{exact} ({exact / len(members):.0%})", f"{statistics.median(sizes):.3%}",
            f"{at_95:.3%}", f"{worst:+.3%}", str(low),
        ))  # fmt: skip
    return rows


HEADER = (
    "device", "bytes", "phase", "runs", "equal to the byte", "median error", "95th percentile",
    "worst", "too low in",
)  # fmt: skip


def print_errors(records: Sequence[RunRecord]) -> None:
    """The distribution as a table; which records hold no plan is said."""
    table = Table(*HEADER)
    for row in distribution(errors(records)):
        table.add_row(*row)
    out = console()
    out.print(table)
    without = sum(record.plan is None for record in records)
    if without:
        out.print(f"{without} of {len(records)} records hold no plan")
