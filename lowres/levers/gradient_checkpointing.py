"""Keep only each block's input in the forward pass; recompute the inside of a block in backward.

Paper: Training Deep Nets with Sublinear Memory Cost, Chen et al. 2016.
https://arxiv.org/abs/1604.06174

Departs from the paper: segments are the model's blocks, not sqrt(n) of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from lowres.core.parts import Lever, part

if TYPE_CHECKING:
    from lowres.core.learner import Learner


@part
class GradientCheckpointing(Lever):
    """Saves the activations inside all blocks but one; costs about one more forward pass.

    Non-reentrant, so that gradients flow although the embeddings below are frozen.
    """

    effect: ClassVar[Literal["exact", "lossy"]] = "exact"
    searched: ClassVar[int | None] = 0

    def on_learner(self, learner: Learner) -> Learner:
        from lowres.bridges import blocks, peft

        blocks.checkpoint_blocks(peft.unwrap_adapted(learner.base))
        return learner
