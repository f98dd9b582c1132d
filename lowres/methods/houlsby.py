"""Add a small non-linear network behind self-attention and the feed-forward part of each block.

Paper: Parameter-Efficient Transfer Learning for NLP, Houlsby et al. 2019.
https://arxiv.org/abs/1902.00751

Departs from the paper: the up-projection starts at zero instead of near it, so that the first
outputs are exactly the model's, and the down-projection from Kaiming's uniform distribution instead
of a narrow normal one; norms stay frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveInt, part
from lowres.methods._adapter import Adapter
from lowres.methods._adapters import Activation, behind_both, serial

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class Houlsby(Adapter):
    """`h + W_up act(W_down h + b_down) + b_up`, twice a block; not merged, since it is no linear
    map. Its input is kept for backward beside the activations of the model.

    Args:
        reduction: The bottleneck has d / reduction units.
        activation: relu, gelu, swish or tanh.
    """

    taxonomy: ClassVar[Taxonomy] = "additive: adapters"
    # Grid of Scaling Down to Scale Up (https://arxiv.org/abs/2303.15647): 1e-3 to 5e-5.
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-5, 1e-3)

    reduction: PositiveInt = 16
    activation: Activation = "swish"

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        return serial(behind_both(model, blocks), self.reduction, self.activation)
