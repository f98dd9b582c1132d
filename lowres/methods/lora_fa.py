"""LoRA whose first matrix stays as it was drawn: only B of `W x + (alpha / r) B A x` is trained.

Paper: LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning,
Zhang et al. 2023. https://arxiv.org/abs/2308.03303

Departs from the paper: A starts Kaiming-uniform, as in PEFT; the recipe's optimizer gets the
gradient of B as it is (a later version of the paper corrects it by the inverse of A A^T).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveFloat, PositiveInt, part
from lowres.methods._injected import Injected

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks


@part
class LoraFa(Injected):
    """Backward keeps A x, of r features, and not x, of all; gradients and optimizer states are
    those of B, about half of LoRA's. Saved and loaded as LoRA.

    Args:
        rank: r.
        alpha: The product is scaled by alpha / rank.
        targets: `paper` (queries and values), `all-linear`, or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    # The range of lora.
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-5, 1e-3)
    config: ClassVar[str] = "LoraConfig"

    rank: PositiveInt = 8
    alpha: PositiveFloat = 8

    def settings(self) -> Mapping[str, Any]:
        return {"r": self.rank, "lora_alpha": self.alpha}

    def apply(self, model: nn.Module, blocks: Blocks) -> nn.Module:
        adapted = super().apply(model, blocks)
        for name, parameter in adapted.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
        return adapted
