"""KronA^B: add a trained Kronecker product beside the feed-forward part of each block.

Paper: KronA: Parameter Efficient Tuning with Kronecker Adapter, Edalati et al. 2022.
https://arxiv.org/abs/2212.10650

Departs from the paper: the sizes of A and B are the nearest to each other and not searched; norms
stay frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveFloat, part
from lowres.methods._adapter import Adapter
from lowres.methods._adapters import kronecker_beside

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class KronaBlock(Adapter):
    """`FFN(x) + s (A x B) x`; x is kept once for both. Not merged: no weight maps the input of the
    feed-forward part to its output.

    Args:
        scale: s.
    """

    taxonomy: ClassVar[Taxonomy] = "hybrid"
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-4, 1e-3)

    scale: PositiveFloat = 1.0

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.bridges import sites

        return kronecker_beside(sites.feed_forwards(model, blocks), self.scale, residual=False)
