"""Train two vectors around a random low-rank product that all layers share.

Paper: VeRA: Vector-based Random Matrix Adaptation, Kopiczko et al. 2023.
https://arxiv.org/abs/2310.11454

Departs from the paper: the shared matrices are as large as the largest layer wants, and
others take a part of them (as PEFT does; the paper has one pair a shape).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveFloat, PositiveInt, part
from lowres.methods._injected import Injected


@part
class Vera(Injected):
    """`y = W x + b * (B (d * (A x)))` with A (rank, i) and B (o, rank) frozen, random and shared; b
    from 0 and d are trained. A and B are saved with the adapter, since a seed gives other numbers
    elsewhere.

    Args:
        rank: r; large, for what is trained is one number a rank.
        start: Value of d before the first update.
        projection_seed: Of A and B.
        targets: `paper` (queries and values), `all-linear`, or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    # Appendix of the paper: 4e-3 to 1e-2 on GLUE, ten times LoRA's.
    learning_rate_hint: ClassVar[tuple[float, float]] = (4e-3, 2e-2)
    config: ClassVar[str] = "VeraConfig"

    targets: str = "paper"
    rank: PositiveInt = 256
    start: PositiveFloat = 0.1
    projection_seed: int = 0

    def settings(self) -> Mapping[str, Any]:
        return {
            "r": self.rank,
            "d_initial": self.start,
            "projection_prng_key": self.projection_seed,
        }
