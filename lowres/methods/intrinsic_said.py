"""Train one short vector that a fixed random map takes to a change of every linear layer.

Paper: Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning,
Aghajanyan et al. 2020. https://arxiv.org/abs/2012.13255

Departs from the paper: Fastfood makes, for a layer with at most P inputs and outputs, P
coefficients of as many fixed orthogonal rank-one matrices instead of every entry of the weight, so
that the change is applied to activations in P log P; only linear layers inside the blocks change;
the vector has the whole dimension and the scales come on top of it (the paper takes their number
off it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import Circumstance, NonNegativeInt, PositiveInt, part
from lowres.methods._adapter import Adapter

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class IntrinsicSaid(Adapter):
    """Structure-aware: each tensor has a trained scale. Nothing of a weight's size is made; what is
    kept for backward is each input, and while a layer works there are a few arrays of P numbers for
    each token, P being the next power of two.

    Args:
        dimension: Numbers of the shared vector. A layer changes by the vector's norm, so a step of
            Adam moves each by about the learning rate times the root of it.
        seed: Of the random maps. They are drawn anew from it when an adapter is loaded.
        targets: `all-linear`, `paper` (queries and values), or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    # 3e-2 for T0 in https://arxiv.org/abs/2205.05638.
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-3, 3e-2)
    mergeable: ClassVar[bool] = True
    refuses: ClassVar[Mapping[Circumstance, str]] = {
        "rotating": "what it trains is one vector of all blocks, beside a single number for each "
        "layer, so that next to nothing would take turns; use 'lora', or freezing 'prefix'"
    }

    dimension: PositiveInt = 2000
    seed: NonNegativeInt = 0
    targets: str = "all-linear"

    def uneven(self) -> str | None:
        return "all blocks use one vector, which lies in the first"

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.bridges.peft import linear_targets
        from lowres.core.delta import Piece
        from lowres.methods._fastfood import FastfoodDelta

        settings = {"dimension": self.dimension, "seed": self.seed}
        return [Piece(FastfoodDelta, linear_targets(model, blocks, self.targets), settings)]
