"""Scale the inputs of frozen linear layers by trained vectors: y = W (s x) + b.

Paper: See Further for Parameter Efficient Fine-tuning by Standing on the Shoulders of
Decomposition, Si et al. 2024. https://arxiv.org/abs/2407.05417

Departs from the paper: the change s - 1 is trained, from 0, so that weight decay pulls the scale to
one; the activation is scaled instead of the weight.
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
class Ssl(Adapter):
    """One number for each input. With activations in 16 bits a change of less than about 1/512
    (bfloat16) or 1/4096 (float16) is rounded away.

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
        from lowres.methods._scaled_sides import ScaledInput
        from lowres.methods._sides import scaled

        return [Piece(ScaledInput, scaled(model, blocks, self.targets))]
