"""What freezings share that train the blocks with the highest scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowres.core.errors import InputError, Problem
from lowres.core.parts import PositiveInt, part
from lowres.core.scored import Scored

if TYPE_CHECKING:
    from lowres.core.blocks import Blocks
    from lowres.core.learner import Learner
    from lowres.core.sample import Sample


@part
class Highest(Scored):
    """Of `names` as many as `trained` says; of equal scores the higher block."""

    trained: PositiveInt

    def blocks(self, learner: Learner, sample: Sample) -> Blocks:
        self._stop_at_too_many(learner.blocks.names)
        return super().blocks(learner, sample)

    def choice(self, names: Sequence[str], scores: Sequence[float]) -> Sequence[str]:
        order = sorted(range(len(names)), key=lambda place: (scores[place], place))
        return [names[place] for place in order[-self.trained :]]

    def costliest(self, names: Sequence[str]) -> Sequence[str]:
        self._stop_at_too_many(names)
        # The lowest, down to which all is kept for backward; and the highest, whose gradients are
        # there while most of that still is.
        return [names[0], *names[len(names) - self.trained + 1 :]]

    def _stop_at_too_many(self, names: Sequence[str]) -> None:
        if self.trained > len(names):
            text = f"{self.trained} is more than the {len(names)} blocks of the model"
            raise InputError("the recipe", [Problem("freezing.trained", text)])
