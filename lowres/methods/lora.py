"""Add a trained low-rank product to frozen linear layers: y = W x + (alpha / r) B A x.

Paper: LoRA: Low-Rank Adaptation of Large Language Models, Hu et al. 2021.
https://arxiv.org/abs/2106.09685

Departs from the paper: A starts Kaiming-uniform instead of Gaussian (as PEFT and the authors' code
do).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from lowres.core.method import Method, Taxonomy
from lowres.core.parts import PositiveFloat, PositiveInt, part

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks


@part
class Lora(Method):
    """LoRA through PEFT.

    Args:
        rank: r; memory of gradients and optimizer states grows with it.
        alpha: The product is scaled by alpha / rank.
        dropout: On the layer's input. 0 unless wanted: a dropped-out copy of each input is kept for
            backward, which doubles the saved activations of adapted layers.
        targets: `paper` (queries and values), `all-linear`, or layer names joined by `+`.
    """

    searched: ClassVar[bool] = True
    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    # Grid of Scaling Down to Scale Up (https://arxiv.org/abs/2303.15647): 1e-3 to 5e-5.
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-5, 1e-3)
    mergeable: ClassVar[bool] = True

    rank: PositiveInt = 8
    alpha: PositiveFloat = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: str = "paper"

    def apply(self, model: nn.Module, blocks: Blocks) -> nn.Module:
        from lowres.bridges import peft

        config = peft.lora_config(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=peft.linear_targets(model, blocks, self.targets),
        )
        return peft.inject(model, config, blocks)

    def merge(self, model: nn.Module) -> nn.Module:
        from lowres.bridges import peft

        return peft.merge(model)
