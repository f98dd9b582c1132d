"""Add networks of Kronecker products that share a factor behind attention and feed-forward parts.

Paper: Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, Mahabadi et al. 2021.
https://arxiv.org/abs/2106.04647

Departs from the paper: the left factors of the up-projection start at zero, so that the first
outputs are exactly the model's; norms stay frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import Circumstance, PositiveInt, part
from lowres.methods._adapter import Adapter
from lowres.methods._adapters import ROTATING, SHARED, Activation, behind_both, hypercomplex

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class Compacter(Adapter):
    """`h + W_up act(W_down h + b_down) + b_up` twice a block. Both matrices are a sum over j of
    A_j x (s_j t_j) with the A_j of all adapters in common, and are never built. Not merged, since
    it is no linear map.

    Args:
        reduction: The bottleneck has d / reduction units, or the next smaller multiple of `terms`,
            and one at least.
        activation: relu, gelu, swish or tanh.
        terms: n, how many terms the sum has; the A_j are n x n.
        rank: r of the products s_j t_j.
    """

    taxonomy: ClassVar[Taxonomy] = "hybrid"
    # 3e-3 in the paper; 1e-3 is the upper end of Scaling Down to Scale Up
    # (https://arxiv.org/abs/2303.15647).
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-3, 3e-3)
    refuses: ClassVar[Mapping[Circumstance, str]] = {"rotating": ROTATING}

    reduction: PositiveInt = 32
    activation: Activation = "gelu"
    terms: PositiveInt = 4
    rank: PositiveInt = 1

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        behind = behind_both(model, blocks)
        return hypercomplex(model, behind, self.reduction, self.activation, self.terms, self.rank)

    def uneven(self) -> str:
        return SHARED
