"""Train how random low-rank products add up to a change of full rank.

Paper: RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models, Albert et al. 2025.
https://arxiv.org/abs/2502.00987

Departs from the paper: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveInt, part
from lowres.methods._injected import Injected


@part
class Randlora(Injected):
    """`y = W x + (alpha / rank) sum_j B_j diag(l_j) A diag(g_j) x` over min(i, o) / rank products
    with B_j and A frozen, random and shared by all layers; l from 0 and g from 1 / max(i, o) are
    trained. Where o < i the sum is transposed, and g scales outputs. The random matrices are saved
    with the adapter; they hold max(i) max(o) numbers and more.

    Args:
        rank: Of each product; a larger one means fewer products and fewer parameters.
        alpha: The sum is scaled by alpha / rank.
        projection_seed: Of the random matrices.
        targets: `paper` (queries and values), `all-linear`, or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    # The range of lora.
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-5, 1e-3)
    config: ClassVar[str] = "RandLoraConfig"

    targets: str = "paper"
    rank: PositiveInt = 32
    # 20 times the rank, as in PEFT.
    alpha: PositiveInt = 640
    projection_seed: int = 0

    def settings(self) -> Mapping[str, Any]:
        return {
            "r": self.rank,
            "randlora_alpha": self.alpha,
            "projection_prng_key": self.projection_seed,
        }
