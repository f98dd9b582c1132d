"""Add a low-rank product to frozen linear layers, with each of its two factors a tensor train.

Paper: LoRETTA: Low-Rank Economic Tensor-Train Adaptation for Ultra-Low-Parameter Fine-Tuning of
Large Language Models, Yang et al. 2024. https://arxiv.org/abs/2402.11417

Departs from the paper: the last core of B starts at zero, where the paper subtracts what the
random start adds; norms and the classifier are as the model has them (the paper trains norms and
makes the classifier a train too); modes are found from the sizes.
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
class LorettaRep(Adapter):
    """`y = W x + (alpha / rank) TT(B) TT(A) x`; x is kept, the factors are made anew in backward.

    Args:
        rank: Rows of A, columns of B.
        alpha: The product is scaled by alpha / rank.
        train_rank: Rank between cores, which bounds the rank of the product too.
        targets: `paper` (queries and values), `all-linear`, or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    # The paper: 1e-4; 1e-4 to 5e-4 for BERT-like models.
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-4, 1e-3)
    mergeable: ClassVar[bool] = True

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16
    train_rank: PositiveInt = 5
    targets: str = "paper"

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.bridges.peft import linear_targets
        from lowres.core.delta import Piece
        from lowres.methods._tensor_train import TensorTrainPair

        settings = {"rank": self.rank, "alpha": self.alpha, "train_rank": self.train_rank}
        return [Piece(TensorTrainPair, linear_targets(model, blocks, self.targets), settings)]
