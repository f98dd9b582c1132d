"""Add a wide non-linear network beside the feed-forward part of each block, scaled as it learns.

Paper: Towards a Unified View of Parameter-Efficient Transfer Learning, He et al. 2022.
https://arxiv.org/abs/2110.04366

Departs from the paper: the scalar is trained, from 1, as in Scaling Down to Scale Up
(https://arxiv.org/abs/2303.15647); the paper fixes it at 4 (see `parallel`);
norms stay frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveFloat, PositiveInt, part
from lowres.methods._adapter import Adapter
from lowres.methods._adapters import Activation, parallel

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class ScaledParallel(Adapter):
    """`FFN(x) + s (W_up act(W_down x + b_down) + b_up)`; x is kept once for both.

    Args:
        reduction: The bottleneck has d / reduction units.
        activation: relu, gelu, swish or tanh.
        scale: s before the first update.
    """

    taxonomy: ClassVar[Taxonomy] = "additive: adapters"
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-5, 1e-3)

    reduction: PositiveInt = 2
    activation: Activation = "relu"
    scale: PositiveFloat = 1.0

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.bridges import sites

        there = sites.feed_forwards(model, blocks)
        return parallel(there, self.reduction, self.activation, self.scale, learned=True)
