"""LoRA whose scale falls with the root of the rank, so that high ranks learn as fast as low ones.

Paper: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, Kalajdzievski 2023.
https://arxiv.org/abs/2312.03732

Departs from the paper: A starts Kaiming-uniform, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveFloat, PositiveInt, part
from lowres.methods._injected import Injected


@part
class Rslora(Injected):
    """`y = W x + (alpha / sqrt(rank)) B A x`.

    Args:
        rank: r; the method differs from lora where it is large.
        alpha: The product is scaled by alpha / sqrt(rank).
        targets: `paper` (queries and values), `all-linear`, or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    # The range of lora: at rank 64 and alpha 16 the scale is 2.
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-5, 1e-3)
    config: ClassVar[str] = "LoraConfig"

    rank: PositiveInt = 64
    alpha: PositiveFloat = 16

    def settings(self) -> Mapping[str, Any]:
        return {"r": self.rank, "lora_alpha": self.alpha, "use_rslora": True}
