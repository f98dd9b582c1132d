"""Train keys and values before those of every attention, and wide adapters beside feed-forward.

Paper: Towards a Unified View of Parameter-Efficient Transfer Learning, He et al. 2022.
https://arxiv.org/abs/2110.04366

Departs from the paper: norms stay frozen; vectors start random; keys take no rotary position and no
bias of relative positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveFloat, PositiveInt, part
from lowres.methods._adapters import Activation, parallel
from lowres.methods._prefixes import Prefixed, prefixes

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class Mam(Prefixed):
    """The MAM adapter: `prefix_tuning` with few keys, and `FFN(x) + s A(x)` with s fixed. A prefix
    always takes a share of the attention, so the outputs are not the checkpoint's before the first
    update. With `mlp: null` it is the cut that takes the least memory.

    Args:
        length: Trained keys for each attention.
        mlp: Inner width of the network that makes them; null for plain tables.
        reduction: The bottleneck has d / reduction units.
        activation: relu, gelu, swish or tanh.
        scale: s.
    """

    taxonomy: ClassVar[Taxonomy] = "hybrid"
    # The paper takes 5e-5, and 1e-4 for classification.
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-5, 1e-3)

    length: PositiveInt = 30
    mlp: PositiveInt | None = 800
    reduction: PositiveInt = 2
    activation: Activation = "relu"
    scale: PositiveFloat = 4.0

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.bridges import sites

        there = sites.feed_forwards(model, blocks)
        return [
            *prefixes(model, blocks, self.length, self.mlp),
            *parallel(there, self.reduction, self.activation, self.scale, learned=False),
        ]
