"""Add one trained matrix, repeated along the inputs, to each weight.

Paper: MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure,
Kang and Yin 2024. https://arxiv.org/abs/2409.15371

Departs from the paper: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveInt, part
from lowres.methods._injected import Injected


@part
class Miss(Injected):
    """`y = W x + D^T s(x)`, with D (rank, o) from zero and s(x) the sum of x over shards of `rank`
    features; where `rank` does not divide the inputs the last shard is short.

    Args:
        rank: Features of a shard, and parameters of each output.
        targets: `paper` (queries and values), `all-linear`, or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    # The range of lora, of which it is the case of a fixed A of zeros and ones.
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-5, 1e-3)
    sample_fields: ClassVar[Mapping[str, Any]] = {"rank": 4}
    config: ClassVar[str] = "MissConfig"

    rank: PositiveInt = 64

    def settings(self) -> Mapping[str, Any]:
        return {"r": self.rank}

    def misfit(self, inputs: int, outputs: int) -> str | None:
        if self.rank > inputs:
            return f"rank {self.rank} is more than its {inputs} inputs; set it to at most that"
        return None
