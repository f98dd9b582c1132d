"""Memory and time of the updates that a process makes."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Container, Iterable, Iterator

import torch

from lowres.core.record import StepTime
from lowres.memory.meter import Meter

PROBED_UPDATES = 2
"""The first update and the first with optimizer states: on CPU their live bytes are counted."""
WARM_UP_UPDATES = 1
"""Updates after the probes that are not timed."""


class Measuring:
    """What a session is told of its updates.

    Args:
        held: The tensors that are alive between updates.
        largest: Updates that are probed beside the first two, by number.
    """

    def __init__(
        self, meter: Meter, held: Callable[[], Iterable[torch.Tensor]], largest: Container[int]
    ) -> None:
        self._meter, self._held = meter, held
        # A card's own meter sees every update.
        self._largest: Container[int] = () if meter.device.type == "cuda" else largest
        self.made = 0
        self._timed: list[tuple[float, float]] = []
        self._steady: contextlib.ExitStack | None = None

    @contextlib.contextmanager
    def update(self, step: int) -> Iterator[None]:
        """The memory of one, and of what lies between it and the next."""
        probed = self._probed(step)
        if probed:
            self.close()
            with self._meter.phase("steady_steps" if self.made else "first_step", self._held):
                yield
        else:
            if self._steady is None:
                self._steady = contextlib.ExitStack()
                self._steady.enter_context(self._meter.phase("steady_steps"))
            yield

    def took(self, step: int, seconds: float, tokens: float) -> None:
        """An update was made."""
        timed = self.made >= PROBED_UPDATES + WARM_UP_UPDATES and not self._probed(step)
        if timed:
            self._timed.append((seconds, tokens))
        self.made += 1

    def close(self) -> None:
        """End the measurement of steady steps (it goes on with the next update)."""
        if self._steady is not None:
            self._steady.close()
            self._steady = None

    def step_time(self) -> StepTime | None:
        """Percentiles over the timed updates; None when there were fewer than two."""
        if len(self._timed) < 2:
            return None
        seconds = [s for s, _ in self._timed]
        cuts = statistics.quantiles(seconds, n=10, method="inclusive")
        return StepTime(
            n=len(seconds),
            p20_seconds=cuts[1],
            p50_seconds=statistics.median(seconds),
            p80_seconds=cuts[7],
            tokens_per_second=sum(t for _, t in self._timed) / sum(seconds),
        )

    def _probed(self, step: int) -> bool:
        return self.made < PROBED_UPDATES or step in self._largest
