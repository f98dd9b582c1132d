"""Split each weight into magnitude and direction; train one, and the other by a low-rank product.

Paper: DoRA: Weight-Decomposed Low-Rank Adaptation, Liu et al. 2024.
https://arxiv.org/abs/2402.09353

Departs from the paper: every linear layer of the blocks, where the paper leaves some out
(the attention's output, the gate); no dropout on what enters A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import Circumstance, PositiveFloat, PositiveInt, part
from lowres.methods._injected import Injected

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks


@part
class Dora(Injected):
    """`y = m / ||V|| * V x` with `V = W + (alpha / rank) B A`, its norm along the inputs and
    without a gradient (section 4.3), m from ||W||.

    Every forward pass makes V for its norm, some rows at a time, and unpacks weights in 4 and 8
    bits for it.

    Args:
        rank: r.
        alpha: The product is scaled by alpha / rank.
        targets: `paper` (queries and values), `all-linear`, or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    # Appendix of the paper: 1e-4 for LLaMA3-8B, 2e-4 for the others.
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-4, 4e-4)
    refuses: ClassVar[Mapping[Circumstance, str]] = {
        "divided": "the norm of W + B A needs the whole weight, of which each process "
        "holds a part; use lora, or stage 2",
    }
    config: ClassVar[str] = "LoraConfig"

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32

    def apply(self, model: nn.Module, blocks: Blocks) -> nn.Module:
        from lowres.bridges import lora

        adapted = super().apply(model, blocks)
        lora.stop_at_zeros(adapted)
        return adapted

    def settings(self) -> Mapping[str, Any]:
        return {"r": self.rank, "lora_alpha": self.alpha, "use_dora": True}
