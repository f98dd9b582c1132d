"""What a procedure may use of the run it organises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lowres.core.example import Row
    from lowres.core.learner import Learner
    from lowres.core.recipe import Recipe


class Session(Protocol):
    """A prepared run. A procedure decides in which order rows are trained on; the session does each
    update: micro-batches, seeding, out-of-memory recovery, timing, logging, budget.
    """

    recipe: Recipe
    learner: Learner

    def updates(self) -> Iterator[tuple[int, Sequence[Row]]]:
        """The updates still to be made:
        their number (from 0) and the rows of their global batch.
        """

    def update(self, step: int, rows: Sequence[Row]) -> float:
        """Make one optimizer update over the rows; returns the mean loss over their targets."""

    def after(self, step: int) -> None:
        """Evaluate and save where the recipe says so. Call it after each update."""
