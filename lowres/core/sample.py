"""Training rows that a freezing may look at before it chooses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.example import Batch, Row
    from lowres.core.learner import Learner
    from lowres.core.parts import Objective


@dataclass(frozen=True)
class Sample:
    """Rows of the training split, and what the run makes of them.

    Args:
        rows: All that the run trains on.
        collate: Makes a batch of some.
        objective: The run's.
        size: Rows of a micro-batch.
        largest_only: Give the largest batch alone: a plan needs no more.
    """

    rows: Sequence[Row]
    collate: Callable[[Sequence[Row]], Batch]
    objective: Objective
    size: int
    largest_only: bool = False

    def batches(self, rows: int, size: int | None = None) -> Iterator[Batch]:
        """At most `rows` rows, spread evenly over the data set, `size` at a time (None: those of a
        micro-batch), on the CPU.
        """
        there, size = len(self.rows), size or self.size
        count = min(rows, there)
        chosen = [self.rows[number * there // count] for number in range(count)]
        groups = [chosen[start : start + size] for start in range(0, count, size)]
        if self.largest_only:
            groups = [max(groups, key=lambda group: max(row.length for row in group) * len(group))]
        return (self.collate(group) for group in groups)

    def loss(self, learner: Learner, batch: Batch) -> torch.Tensor:
        """The mean of the loss over a batch's targets."""
        return self.objective.loss(learner, batch) / max(1, self.objective.targets(batch))


@contextlib.contextmanager
def untrained(model: nn.Module) -> Iterator[None]:
    """Nothing is trained but what the block says; afterwards, what was before."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.grad = None
            parameter.requires_grad_(required)
