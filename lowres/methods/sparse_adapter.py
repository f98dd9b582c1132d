"""Add a non-linear network behind parts of each block, most of whose weights do not exist.

Paper: SparseAdapter: An Easy Approach for Improving the Parameter-Efficiency of Adapters, He et al.
2022. https://arxiv.org/abs/2210.04284

Departs from the paper: what is kept is chosen before any data is seen and within each matrix, so
its scores from gradients (SNIP, GraSP) are left out, and so is Erdos-Renyi, which keeps the same
share of matrices of one shape and is `random` then. The up-projection starts at zero: its
magnitudes are those of a draw that is not used further. Biases are kept; norms stay frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveInt, part
from lowres.methods._adapter import Adapter
from lowres.methods._adapters import Activation, behind_both, behind_feed_forward, masked

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class SparseAdapter(Adapter):
    """`h + W_up act(W_down h + b_down) + b_up` with a fixed choice of weights; those that there are
    are stored with their places (4 bytes each), the others never. Saves parameters, gradients and
    states, and neither activations nor time: `reduction: 4, sparsity: 0.75` trains as many weights
    as a reduction of 16 without gaps (the paper's Large-Sparse), and keeps activations of its
    greater width.

    Args:
        reduction: The bottleneck has d / reduction units.
        activation: relu, gelu, swish or tanh.
        sites: `both` (behind self-attention and behind the feed-forward part) or `feed_forward`.
        sparsity: Share of each matrix that is missing.
        score: What decides: `magnitude` of the initial weights, or `random`.
    """

    taxonomy: ClassVar[Taxonomy] = "hybrid"
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-5, 1e-3)

    reduction: PositiveInt = 16
    activation: Activation = "swish"
    sites: Literal["both", "feed_forward"] = "both"
    # Scaling Down to Scale Up (https://arxiv.org/abs/2303.15647): about 40 %.
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.4
    score: Literal["magnitude", "random"] = "magnitude"

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        places = behind_both if self.sites == "both" else behind_feed_forward
        behind = places(model, blocks)
        return masked(behind, self.reduction, self.activation, self.sparsity, self.score)
