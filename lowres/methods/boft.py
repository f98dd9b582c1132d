"""Rotate each layer's input by a trained product of sparse orthogonal factors, as in an FFT.

Paper: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, Liu et al. 2023.
https://arxiv.org/abs/2311.06243

Departs from the paper: the input is rotated and not the weight; outputs are scaled by a trained
vector, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lowres.core.errors import InputError, Problem
from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveInt, part
from lowres.methods._adapter import Adapter

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class Boft(Adapter):
    """`y = s * (W R x) + b` with R = B_1 ... B_M, each with blocks that are Cayley transforms of
    skew-symmetric matrices from 0, between features ever farther apart; with one factor it is oft.

    Every factor keeps its input for backward. Nothing as large as a weight is made.

    Args:
        block_size: Of each block.
        factors: M; `block_size 2^(M - 1)` divides every layer's inputs.
        targets: `paper` (queries and values), `all-linear`, or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    # The range of lora.
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-5, 1e-3)
    mergeable: ClassVar[bool] = True

    block_size: PositiveInt = 8
    factors: PositiveInt = 2
    targets: str = "all-linear"

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.bridges.peft_configs import linears
        from lowres.core.delta import Piece
        from lowres.methods._butterfly import ButterflyDelta

        there = linears(model, blocks, self.targets)
        unit = self.block_size * 2 ** (self.factors - 1)
        for layer in there:
            if self.block_size % 2 or layer.inputs % unit:
                text = (
                    f"'boft' at {layer.path}: block_size {self.block_size} is odd, or times "
                    f"2^{self.factors - 1} does not divide its {layer.inputs} inputs; lower "
                    "factors, or choose a smaller block_size"
                )
                raise InputError("the recipe", [Problem("method", text)])
        settings = {"block_size": self.block_size, "factors": self.factors}
        return [Piece(ButterflyDelta, [layer.path for layer in there], settings)]
