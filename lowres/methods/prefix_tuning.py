"""Train keys and values that stand before those of every attention.

Paper: Prefix-Tuning: Optimizing Continuous Prompts for Generation, Li and Liang 2021.
https://arxiv.org/abs/2101.00190

Departs from the paper: vectors start random, not at the activations of real words; keys take no
rotary position and no bias of relative positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveInt, part
from lowres.methods._prefixes import Prefixed, prefixes

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class PrefixTuning(Prefixed):
    """`softmax(q [P_K; K]^T) [P_V; V]`, in other words `(1 - l) h + l softmax(q P_K^T) P_V` with l
    the share of the weights that fall to the prefix. That share is never zero, so the outputs are
    not the checkpoint's before the first update.

    P_K and P_V are tables, or `W_2 tanh(W_1 p + b_1) + b_2` of trained vectors p; vectors and W_1
    are shared by the attentions of a kind: those of the encoder, of the decoder, and those between.
    That network takes more memory than the tables (about 2 d mlp for each attention, as against
    2 d length) and can be dropped after training (`flatten` of `lowres.methods._prefix`). The
    prefix is in no cache and takes no positions. A mask is written out for it where the attention
    of a decoder does without.

    Args:
        length: Trained keys for each attention.
        mlp: Inner width of the network; null for plain tables.
    """

    taxonomy: ClassVar[Taxonomy] = "additive: soft prompts"
    # The paper takes 5e-5; later work goes up to 3e-3.
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-5, 3e-3)

    length: PositiveInt = 30
    mlp: PositiveInt | None = 512

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        return prefixes(model, blocks, self.length, self.mlp)
