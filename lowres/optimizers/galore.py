"""AdamW in the space of each gradient's leading singular vectors, which is found anew now and then.

Paper: GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, Zhao et al. 2024.
https://arxiv.org/abs/2403.03507

Departs from the paper: biases and norm weights are not decayed. Written after the paper's equations
because galore-torch (1.0, March 2024) keeps its projections in Python objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lowres.core.parts import Optimizer, PositiveFloat, PositiveInt, part
from lowres.optimizers._adam import EMBEDDING, Beta

if TYPE_CHECKING:
    import torch
    from torch import nn


@part
class Galore(Optimizer):
    """States of a matrix (n, m) with n <= m: moments 2 r m and the projection r n, as wide as it.

    Vectors, embedding tables and matrices with a side of at most `rank` are updated by AdamW.

    Args:
        lr: Peak learning rate; the schedule scales it.
        rank: Of the projection.
        interval: Updates between two singular value decompositions.
        scale: Factor on projected updates.
    """

    refuses: ClassVar[Mapping[Literal["in_backward", "on_host", "divided"], str]] = {
        "divided": "looks at matrices, and DeepSpeed lays parameters into one vector; use adamw "
        "with this lever",
    }
    sample_fields: ClassVar[Mapping[str, Any]] = {"lr": 1e-2, "rank": 2}

    lr: PositiveFloat
    rank: PositiveInt = 128
    interval: PositiveInt = 200
    scale: PositiveFloat = 0.25
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0

    def make(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        from lowres.optimizers import _low_rank

        return _low_rank.Galore(
            _low_rank.groups_of(parameters, self.rank, self.weight_decay, EMBEDDING),
            {"lr": self.lr, "interval": self.interval, "scale": self.scale, "betas": self.betas,
             "eps": self.eps},
        )  # fmt: skip
