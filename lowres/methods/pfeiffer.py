"""Add a small non-linear network behind the feed-forward part of each block.

Paper: AdapterFusion: Non-Destructive Task Composition for Transfer Learning, Pfeiffer et al. 2020.
https://arxiv.org/abs/2005.00247

Departs from the paper: the up-projection starts at zero instead of near it, so that the first
outputs are exactly the model's; norms stay frozen; where a norm follows the residual sum (BERT),
the adapter stands before that sum instead of behind the norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveInt, part
from lowres.methods._adapter import Adapter
from lowres.methods._adapters import Activation, behind_feed_forward, serial

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class Pfeiffer(Adapter):
    """`h + W_up act(W_down h + b_down) + b_up`, once a block; not merged, since it is no linear
    map. Its input is kept for backward beside the activations of the model.

    Args:
        reduction: The bottleneck has d / reduction units.
        activation: relu, gelu, swish or tanh.
    """

    taxonomy: ClassVar[Taxonomy] = "additive: adapters"
    # Grid of Scaling Down to Scale Up (https://arxiv.org/abs/2303.15647): 1e-3 to 5e-5.
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-5, 1e-3)

    # The single unit of a very narrow model may be one that ReLU never lets pass.
    sample_fields: ClassVar[Mapping[str, Any]] = {"reduction": 4}

    reduction: PositiveInt = 16
    activation: Activation = "relu"

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        return serial(behind_feed_forward(model, blocks), self.reduction, self.activation)
