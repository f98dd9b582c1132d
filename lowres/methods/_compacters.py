"""What Compacter and Compacter++ share: all but the places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lowres.core.parts import PositiveInt, part
from lowres.methods._adapter import Adapter
from lowres.methods._adapters import SHARED, Activation, hypercomplex

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class Compacters(Adapter):
    """Adapters whose matrices are sums of Kronecker products with the left factors in common.

    Args:
        reduction: The bottleneck has d / reduction units.
        activation: relu, gelu, swish or tanh.
        terms: How many terms the sum has.
        rank: Of each term's right factor.
    """

    # 3e-3 in the paper; 1e-3 is the upper end of Scaling Down to Scale Up
    # (https://arxiv.org/abs/2303.15647).
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-3, 3e-3)

    reduction: PositiveInt = 32
    activation: Activation = "gelu"
    terms: PositiveInt = 4
    rank: PositiveInt = 1

    def places(self, model: nn.Module, blocks: Blocks) -> Sequence[str]:
        """The linear layers behind which an adapter stands."""
        raise NotImplementedError

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        behind = self.places(model, blocks)
        return hypercomplex(model, behind, self.reduction, self.activation, self.terms, self.rank)

    def uneven(self) -> str:
        return SHARED
