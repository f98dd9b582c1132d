"""Add a trained Kronecker product to frozen linear layers: y = W x + s (A x B) x.

Paper: KronA: Parameter Efficient Tuning with Kronecker Adapter, Edalati et al. 2022.
https://arxiv.org/abs/2212.10650

Departs from the paper: B is a product of rank `rank` where that makes it smaller, as in Scaling
Down to Scale Up (https://arxiv.org/abs/2303.15647, which took PEFT's LoKr); `rank: null` is the
paper's. The sizes of A and B are the nearest to each other and not searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveFloat, PositiveInt, part
from lowres.methods._adapter import Adapter

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class Krona(Adapter):
    """Of any rank that the two factors' ranks multiply to, for half to all of the parameters of a
    LoRA of rank 1 where sizes have factors near their roots (a size that is twice a prime takes far
    more); no matrix of the layer's size is made in training.

    Args:
        rank: Of B, which is held whole where its longer side is 2 rank at most; null for always.
        scale: s.
        targets: `paper` (queries and values), `all-linear`, or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-4, 1e-3)
    mergeable: ClassVar[bool] = True

    rank: PositiveInt | None = 8
    scale: PositiveFloat = 1.0
    targets: str = "paper"

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.bridges import peft
        from lowres.core.delta import Piece
        from lowres.methods._kronecker import KroneckerDelta

        targets = peft.linear_targets(model, blocks, self.targets)
        return [Piece(KroneckerDelta, targets, {"rank": self.rank, "scale": self.scale})]
