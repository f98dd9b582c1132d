"""Add networks of Kronecker products that share a factor behind self-attention and feed-forward.

Paper: Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, Mahabadi et al. 2021.
https://arxiv.org/abs/2106.04647

Departs from the paper: the left factors of the up-projection start at zero, so that the first
outputs are exactly the model's; shared factors start wider than in the authors' code; norms stay
frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import part
from lowres.methods._adapters import behind_both
from lowres.methods._compacters import Compacters

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks


@part
class Compacter(Compacters):
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

    def places(self, model: nn.Module, blocks: Blocks) -> Sequence[str]:
        return behind_both(model, blocks)
