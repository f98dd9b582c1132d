"""Add the elementwise product of two trained low-rank products to each weight.

Paper: FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning,
Hyeon-Woo et al. 2021. https://arxiv.org/abs/2108.06098

Departs from the paper: the product is added to a frozen weight, as in LyCORIS
(https://arxiv.org/abs/2309.14859); the paper trains it in the weight's place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveFloat, PositiveInt, part
from lowres.methods._injected import Injected


@part
class Loha(Injected):
    """`y = W x + (alpha / rank) ((B1 A1) * (B2 A2)) x`, elementwise, of rank up to rank^2; A2
    starts at zero. Every forward pass makes the product, which is as large as the weight.

    Args:
        rank: r of each product.
        alpha: The change is scaled by alpha / rank.
        targets: `paper` (queries and values), `all-linear`, or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    # The range of lora.
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-5, 1e-3)
    config: ClassVar[str] = "LoHaConfig"

    rank: PositiveInt = 8
    alpha: PositiveFloat = 8

    def settings(self) -> Mapping[str, Any]:
        return {"r": self.rank, "alpha": self.alpha}
