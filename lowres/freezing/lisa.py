"""Train a few blocks drawn at random, and others after each period; embeddings and top always.

Paper: LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning,
Pan et al. 2024, algorithm 1. https://arxiv.org/abs/2403.17919

Departs from the paper: optimizer states of a block are dropped when it leaves, as memory asks for;
algorithm 1 does not say what becomes of them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lowres.core.errors import InputError, Problem
from lowres.core.parts import NonNegativeInt, PositiveInt, part
from lowres.core.rotation import Rotating

if TYPE_CHECKING:
    from lowres.core.blocks import Blocks
    from lowres.core.learner import Learner
    from lowres.core.sample import Sample


@part
class Lisa(Rotating):
    """With method `full` the embeddings and the output layer of a small model with many words may
    need most of the memory; `badam` leaves them frozen.

    Args:
        at_once: gamma, the blocks that train at a time.
        period: K, the updates between draws.
        seed: Of the draws.
    """

    sample_fields: ClassVar[Mapping[str, Any]] = {"at_once": 1, "period": 2}

    at_once: PositiveInt = 2
    period: PositiveInt = 20
    seed: NonNegativeInt = 0

    def blocks(self, learner: Learner, sample: Sample) -> Blocks:
        count = len(learner.blocks.names)
        if self.at_once > count:
            text = f"{self.at_once} is more than the {count} blocks of the model"
            raise InputError("the recipe", [Problem("freezing.at_once", text)])
        return learner.blocks

    def active(self, names: Sequence[str], turn: int) -> frozenset[str]:
        drawn = random.Random(f"{self.seed} {turn}").sample(range(len(names)), self.at_once)
        return frozenset(names[place] for place in drawn)
