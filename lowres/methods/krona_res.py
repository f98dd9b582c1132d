"""KronA^B_res: add a Kronecker product and a scaled copy of the input beside feed-forward parts.

Paper: KronA: Parameter Efficient Tuning with Kronecker Adapter, Edalati et al. 2022.
https://arxiv.org/abs/2212.10650

Departs from the paper: s_res starts at 0, so that the first outputs are exactly the model's; the
sizes of A and B are the nearest to each other and not searched; norms stay frozen.
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
class KronaRes(Adapter):
    """`FFN(x) + s (A x B) x + s_res x` with s_res trained; x is kept once for all. Not merged: no
    weight maps the input of the feed-forward part to its output.

    Args:
        scale: s.
    """

    taxonomy: ClassVar[Taxonomy] = "hybrid"
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-4, 1e-3)

    scale: PositiveFloat = 1.0

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.bridges import sites

        return kronecker_beside(sites.feed_forwards(model, blocks), self.scale, residual=True)
