"""Train one block after the other, each for a period with optimizer states of its own.

Paper: BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models,
Luo et al. 2024, algorithm 1. https://arxiv.org/abs/2404.02827

Departs from the paper: any optimizer, not Adam alone; a classification head that was made anew
trains all the time, and so does what blocks share of an adapter.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lowres.core.parts import NonNegativeInt, PositiveInt, part
from lowres.core.rotation import Rotating

if TYPE_CHECKING:
    from lowres.core.blocks import Blocks
    from lowres.core.learner import Learner
    from lowres.core.sample import Sample


@part
class Badam(Rotating):
    """Memory of gradients and optimizer states is that of one block. Embeddings, final norm and
    output layer stay frozen, as in the authors' code.

    Args:
        period: K, the updates that a block makes before the next one is taken.
        order: Of the blocks: `random` anew in each round, `ascending` from the input, `descending`.
        seed: Of the random order.
    """

    sample_fields: ClassVar[Mapping[str, Any]] = {"period": 2}

    period: PositiveInt = 50
    order: Literal["random", "ascending", "descending"] = "random"
    seed: NonNegativeInt = 0

    def blocks(self, learner: Learner, sample: Sample) -> Blocks:
        blocks = learner.blocks
        return blocks.only(blocks.names, train_stem=False, train_top=False)

    def active(self, names: Sequence[str], turn: int) -> frozenset[str]:
        number, place = divmod(turn, len(names))
        order = list(range(len(names)))
        if self.order == "descending":
            order.reverse()
        elif self.order == "random":
            random.Random(f"{self.seed} {number}").shuffle(order)
        return frozenset({names[order[place]]})
