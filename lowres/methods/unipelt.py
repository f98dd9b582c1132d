"""Low-rank products, prefixes and adapters together, each weighed by a trained gate.

Paper: UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning, Mao et al. 2022.
https://arxiv.org/abs/2110.07577

Departs from the paper: every token has its own gates, instead of their mean over the row: a mean
tells a decoder's tokens of those behind them, and differs between reading and generating. Where all
tokens of a row agree, both are the same. Each low-rank product has its own gate, and keys and
values of a prefix share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveFloat, PositiveInt, part
from lowres.methods._adapters import Activation
from lowres.methods._prefixes import Prefixed, prefixes

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class Unipelt(Prefixed):
    """`W x + g (alpha / r) B A x` for queries and values (for queries, keys and values together
    where one layer makes all three), `[g P_K; K]` and `[g P_V; V]` in every attention,
    `FFN(x) + g A(FFN(x))`, with `g = sigmoid(w h + b)` of the part's input h.

    So that a query can have a gate of its own, heads are twice as wide in the attention's kernel.
    A prefix always takes a share of the attention, so the outputs are not the checkpoint's before
    the first update.

    Args:
        rank: r of the products.
        alpha: They are scaled by alpha / rank.
        length: Trained keys for each attention.
        mlp: Inner width of the network that makes them; null for plain tables.
        reduction: The adapter's bottleneck has d / reduction units.
        activation: relu, gelu, swish or tanh.
    """

    taxonomy: ClassVar[Taxonomy] = "hybrid"
    # 1e-4 to 5e-4 by task in the paper.
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-4, 5e-4)

    rank: PositiveInt = 8
    alpha: PositiveFloat = 8
    length: PositiveInt = 10
    mlp: PositiveInt | None = 512
    reduction: PositiveInt = 16
    activation: Activation = "relu"

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.bridges import sites
        from lowres.core.delta import Piece
        from lowres.methods._token_gates import GatedAdapter, GatedLowRank, GatedPrefix

        there = sites.attentions(model, blocks)
        products = list(dict.fromkeys(path for a in there for path in (a.query, a.value)))
        behind = [f.down for f in sites.feed_forwards(model, blocks)]
        bottleneck = {"reduction": self.reduction, "activation": self.activation}
        return [
            Piece(GatedLowRank, products, {"rank": self.rank, "alpha": self.alpha}),
            *prefixes(model, blocks, self.length, self.mlp, GatedPrefix),
            Piece(GatedAdapter, behind, bottleneck),
        ]
