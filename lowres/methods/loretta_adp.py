"""Add a network of tensor trains behind self-attention and the feed-forward part of each block.

Paper: LoRETTA: Low-Rank Economic Tensor-Train Adaptation for Ultra-Low-Parameter Fine-Tuning of
Large Language Models, Yang et al. 2024. https://arxiv.org/abs/2402.11417

Departs from the paper: the last core of the up-projection starts at zero, so that the first outputs
are exactly the model's; norms stay frozen and the classifier is as the model has it (the paper
trains norms and makes the classifier a train too); modes are found from the sizes. (Its code for
LLaMA has three a block instead of two: before gate and up, and after down.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveInt, part
from lowres.methods._adapter import Adapter
from lowres.methods._adapters import Activation

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class LorettaAdp(Adapter):
    """`h + TT_up act(TT_down h + b_down) + b_up`, twice a block; not merged, since it is no linear
    map. Of its own it keeps its input alone, the rest is made anew in backward.

    Args:
        bottleneck: Units between the two trains.
        train_rank: Rank between cores.
        activation: relu, gelu, swish or tanh; tanh as in the authors' code.
    """

    taxonomy: ClassVar[Taxonomy] = "hybrid"
    # The paper: 1e-4; 1e-4 to 5e-4 for BERT-like models.
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-4, 1e-3)

    bottleneck: PositiveInt = 64
    train_rank: PositiveInt = 5
    activation: Activation = "tanh"

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.core.delta import Piece
        from lowres.methods._adapters import behind_both
        from lowres.methods._tensor_train import TensorTrainAdapter

        settings = {
            "bottleneck": self.bottleneck,
            "train_rank": self.train_rank,
            "activation": self.activation,
        }
        return [Piece(TensorTrainAdapter, behind_both(model, blocks), settings)]
