"""Scale the inputs and outputs of frozen linear layers by trained vectors: y = t (W (s x)) + b.

Paper: See Further for Parameter Efficient Fine-tuning by Standing on the Shoulders of
Decomposition, Si et al. 2024. https://arxiv.org/abs/2407.05417

Departs from the paper: the changes s - 1 and t - 1 are trained, from 0, so that weight decay pulls
the scales to one; the activations are scaled instead of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import part
from lowres.methods._adapter import Adapter

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class Ssb(Adapter):
    """One number for each input and output. Backward keeps the layer's input and its output, and
    not the product W (s x) beside them. With activations in 16 bits a change of less than about
    1/512 (bfloat16) or 1/4096 (float16) is rounded away, and beside a bias many times larger than
    the product (keys of Qwen2) so is most of the gradient of t.

    Args:
        targets: `paper` (keys, values, and the layers that widen the feed-forward part),
            `all-linear`, or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    # The paper: 5e-4 to 1.2e-3.
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-4, 1e-2)
    mergeable: ClassVar[bool] = True

    targets: str = "paper"

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.core.delta import Piece
        from lowres.methods._scaled_sides import ScaledSides
        from lowres.methods._sides import scaled

        return [Piece(ScaledSides, scaled(model, blocks, self.targets))]
