"""Freezing by a number for each block, found with training rows before the first update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from lowres.core.errors import LowresError
from lowres.core.parts import Circumstance, Freezing, part

if TYPE_CHECKING:
    import torch

    from lowres.core.blocks import Blocks
    from lowres.core.learner import Learner
    from lowres.core.sample import Sample


@part
class Scored(Freezing):
    """The choice is made where the weights lie after loading, and kept by checkpoints.

    The embeddings stay frozen.
    """

    brings: ClassVar[frozenset[Circumstance]] = frozenset({"frozen_input"})

    def scores(self, learner: Learner, sample: Sample) -> torch.Tensor:
        """A score for each block, shape (L,). The model is left as it was found."""
        raise NotImplementedError

    def choice(self, names: Sequence[str], scores: Sequence[float]) -> Sequence[str]:
        """Which blocks train."""
        raise NotImplementedError

    def costliest(self, names: Sequence[str]) -> Sequence[str]:
        """The choice that takes most memory, for a plan: which one it will be is not known."""
        raise NotImplementedError

    def blocks(self, learner: Learner, sample: Sample) -> Blocks:
        names = learner.blocks.names
        found = [float(score) for score in self.scores(learner, sample).tolist()]
        if not all(map(math.isfinite, found)):
            raise LowresError(
                f"freezing '{self.name}' cannot choose: its scores of the blocks are {found}; "
                "look at the loss of the model as it is, or use freezing 'prefix'"
            )
        return replace(self.keep(learner.blocks, self.choice(names, found)), scores=tuple(found))

    @staticmethod
    def keep(blocks: Blocks, trained: Iterable[str]) -> Blocks:
        """The map with a choice that was made before."""
        return blocks.only(trained, train_stem=False)
