"""What ends a run between two updates: the user, the clock, resident memory, the disk."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from lowres.core import errors
from lowres.core.recipe import Budget
from lowres.core.units import format_bytes, gib_to_bytes
from lowres.run.checkpoint import folder_bytes
from lowres.run.progress import Reporter

_HANG_UP = getattr(signal, "SIGHUP", None)  # Windows has none.


class Limits:
    """Watches a run's budget and the user's wish to stop, on one process.

    Args:
        started: `time.monotonic()` at the start of the run.
    """

    def __init__(self, budget: Budget, output: Path, started: float, reporter: Reporter) -> None:
        self._budget, self._output = budget, output
        self._started, self._reporter = started, reporter
        self._asked = False

    def exceeded(self) -> list[float]:
        """1 for each reason to stop that holds here: asked, time, host memory, disk.

        Numbers, so that processes can add them up and stop after the same update.
        """
        budget = self._budget
        minutes = (time.monotonic() - self._started) / 60
        late = budget.minutes is not None and minutes > budget.minutes
        heavy = budget.host_gib is not None and (
            self._reporter.resident_bytes() > gib_to_bytes(budget.host_gib)
        )
        full = budget.disk_gib is not None and (
            folder_bytes(self._output) > gib_to_bytes(budget.disk_gib)
        )
        return [float(x) for x in (self._asked, late, heavy, full)]

    def error(self, exceeded: Sequence[float], step: int, steps: int) -> errors.LowresError:
        """The error of the first reason that holds somewhere. The checkpoint is written already."""
        asked, late, heavy, _ = exceeded
        budget, saved = self._budget, f"saved {self._output}/checkpoint-{step}"
        if asked:
            return errors.Interrupted(f"stopped after update {step} of {steps}; {saved}")
        if late:
            return errors.OutOfTime(
                f"budget.minutes {budget.minutes} is used up after update {step} of {steps}; "
                f"{saved}, --resume goes on"
            )
        if heavy:
            return errors.OutOfMemory(
                f"resident memory {format_bytes(self._reporter.resident_bytes())} is over "
                f"budget.host_gib {budget.host_gib}; {saved}; lower loop.micro_batch_size or "
                "raise the budget and --resume"
            )
        return errors.LowresError(
            f"the output folder takes {format_bytes(folder_bytes(self._output))}, over "
            f"budget.disk_gib {budget.disk_gib}; {saved}; lower loop.keep_checkpoints or raise the "
            "budget and --resume"
        )

    @contextlib.contextmanager
    def stopping_between_updates(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and a terminal that is closed end the run after the update under way; a
        second one at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if number == _HANG_UP:
                _leave_terminal()
            if self._asked:
                raise KeyboardInterrupt
            self._asked = True
            self._reporter.say("stopping after this update; press Ctrl-C again to stop at once")

        ends = [signal.SIGINT, signal.SIGTERM]
        if _HANG_UP is not None and signal.getsignal(_HANG_UP) is not signal.SIG_IGN:  # by nohup
            ends.append(_HANG_UP)
        with _heeding(ends, ask):
            yield


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """SIGTERM and a terminal that is closed are Ctrl-C where no update is under way, so that the
    record is written; where the program itself heeds them, or nohup, they stay as they are."""

    def stop(number: int, frame: FrameType | None) -> None:
        if number == _HANG_UP:
            _leave_terminal()
        raise KeyboardInterrupt

    ends = [s for s in (signal.SIGTERM, _HANG_UP) if s is not None]
    with _heeding([s for s in ends if signal.getsignal(s) is signal.SIG_DFL], stop):
        yield


@contextlib.contextmanager
def _heeding(
    numbers: Sequence[int], how: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Python hands signals to the main thread alone; in another they stay as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, how) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """Write nowhere from here on: what is written to a terminal that is gone is an error, and one
    of those would cost the checkpoint. Files and pipes stay."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode):
                os.dup2(nowhere, number)
    os.close(nowhere)
