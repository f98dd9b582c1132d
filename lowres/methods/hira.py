"""Multiply each weight elementwise by one plus a trained low-rank product.

Paper: HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models,
Huang et al. 2025. https://openreview.net/forum?id=TwJrTz9cRS

Departs from the paper: every linear layer of the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import Circumstance, PositiveInt, part
from lowres.methods._injected import Injected


@part
class Hira(Injected):
    """`y = W x + (W * (B A)) x`, elementwise: the change has the rank of W at the cost of LoRA's
    parameters.

    Every forward pass makes B A and its product with W, each as large as the weight, and unpacks
    weights in few bits.

    Args:
        rank: r of B A.
        targets: `paper` (queries and values), `all-linear`, or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    # The range of lora, widened: the change is relative to weights far below 1.
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-4, 5e-3)
    refuses: ClassVar[Mapping[Circumstance, str]] = {
        "divided": "the elementwise product wants the whole weight, of which each process "
        "holds a part; use lora, or stage 2",
    }
    config: ClassVar[str] = "HiraConfig"

    rank: PositiveInt = 32

    def settings(self) -> Mapping[str, Any]:
        return {"r": self.rank}
