"""Keep only each block's input in the forward pass; recompute the inside of a block in backward.

Paper: Training Deep Nets with Sublinear Memory Cost, Chen et al. 2016.
https://arxiv.org/abs/1604.06174

Departs from the paper: segments are single blocks, all of them or every k-th, not sqrt(n) of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from lowres.core.parts import Circumstance, Lever, PositiveInt, part

if TYPE_CHECKING:
    from lowres.core.learner import Learner


@part
class GradientCheckpointing(Lever):
    """Saves the activations inside all blocks but one; costs about one more forward pass.

    Non-reentrant, so that gradients flow although the embeddings below are frozen.

    Args:
        every: Recompute the first block and each `every`-th after it; the others keep their
            activations. The share of the saving and of the cost is 1 / every.
    """

    brings: ClassVar[frozenset[Circumstance]] = frozenset({"recomputed"})
    effect: ClassVar[Literal["exact", "lossy"]] = "exact"
    searched: ClassVar[int | None] = 0

    every: PositiveInt = 1

    def uneven(self) -> str | None:
        return None if self.every == 1 else f"one of {self.every} blocks is recomputed"

    def on_learner(self, learner: Learner) -> Learner:
        from lowres.bridges import blocks, peft

        blocks.checkpoint_blocks(peft.unwrap_adapted(learner.base), self.every)
        return learner
