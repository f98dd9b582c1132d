"""LoRA that starts at the principal part of each weight, and leaves the rest of it frozen.

Paper: PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models,
Meng et al. 2024. https://arxiv.org/abs/2404.02948

Departs from the paper: the weight stays as it is and its principal part is taken away beside it, so
that the adapter belongs to the original checkpoint; alpha is the rank. Weights in 4 and 8 bits are
packed whole, and the principal part is that of what they stand for (the paper takes it out before,
and packs the rest).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from lowres.core.errors import InputError, Problem
from lowres.core.method import Taxonomy
from lowres.core.parts import NonNegativeInt, PositiveInt, part
from lowres.methods._adapter import Adapter

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class Pissa(Adapter):
    """`y = W x + (B A - B_0 A_0) x`, with B_0 A_0 the largest singular values of W with their
    vectors, where B and A start. What is frozen is saved with the adapter, which is then twice as
    large as that of lora, and so is its work.

    Args:
        rank: r, singular values of each weight.
        iterations: Of the randomised decomposition; 0 for the exact one, which takes minutes for
            weights of billions.
        targets: `paper` (queries and values), `all-linear`, or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    # 2e-5 in the paper, where A and B are as large as the weights.
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-5, 5e-4)
    mergeable: ClassVar[bool] = True
    sample_fields: ClassVar[Mapping[str, int]] = {"rank": 4, "iterations": 0}

    rank: PositiveInt = 16
    iterations: NonNegativeInt = 16
    targets: str = "all-linear"

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.bridges.peft_configs import linears
        from lowres.core.delta import Piece
        from lowres.methods._principal import PrincipalDelta

        there = linears(model, blocks, self.targets)
        for layer in there:
            if self.rank > min(layer.inputs, layer.outputs):
                text = (
                    f"'pissa' at {layer.path}: rank {self.rank} is more than its "
                    f"{min(layer.inputs, layer.outputs)} singular values; set it to at most that"
                )
                raise InputError("the recipe", [Problem("method", text)])
        settings = {"rank": self.rank, "iterations": self.iterations}
        return [Piece(PrincipalDelta, [layer.path for layer in there], settings)]
