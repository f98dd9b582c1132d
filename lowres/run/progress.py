"""What the user sees while it runs: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lowres.core.record import Score
from lowres.core.units import format_bytes, format_seconds

if TYPE_CHECKING:
    import torch

PLAIN_EVERY_SECONDS = 5.0


class Reporter:
    """Speaks for the main process; silent on the others and with `quiet`."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._bar: Progress | None = None
        self._process = psutil.Process()
        self._peak_bytes = 0
        self._total = 0
        self._first = 0
        self._started = self._spoke = 0.0

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def begin(self, step: int, total: int) -> None:
        self._total, self._first = total, step
        self._started = self._spoke = time.monotonic()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
            self._bar.add_task("training", total=total, completed=step, line="")

    def update(
        self, step: int, loss: float, tokens_per_second: float, device: torch.device
    ) -> None:
        now, peak = self._memory(device)
        line = (
            f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  "
            f"memory {format_bytes(now)}, peak {format_bytes(peak)}"
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, line=line)
            if step == self._total:
                self.end()
        elif self._due(step):
            spent = time.monotonic() - self._started
            left = spent / max(1, step - self._first) * (self._total - step)
            self.say(f"update {step}/{self._total}  {line}  left {format_seconds(left)}")

    def scores(self, scores: Sequence[Score]) -> None:
        for s in scores:
            baseline = "" if s.majority is None else f"  (majority {s.majority:.3f})"
            self.say(
                f"{s.split}: {s.metric} {s.value:.3f} +- {s.stderr:.3f}{baseline}  n={s.n}, "
                f"after update {s.step}"
            )

    def end(self) -> None:
        """Take the live line down."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def resident_bytes(self) -> int:
        return int(self._process.memory_info().rss)

    def _memory(self, device: torch.device) -> tuple[int, int]:
        if device.type == "cuda":
            import torch

            return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        now = self.resident_bytes()
        self._peak_bytes = max(self._peak_bytes, now)
        return now, self._peak_bytes

    def _due(self, step: int) -> bool:
        now = time.monotonic()
        if (
            step == self._first + 1
            or step == self._total
            or now - self._spoke >= PLAIN_EVERY_SECONDS
        ):
            self._spoke = now
            return True
        return False
