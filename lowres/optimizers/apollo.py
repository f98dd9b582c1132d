"""Scale each gradient's channels by what AdamW would do in a small random space.

Paper: APOLLO: SGD-like Memory, AdamW-level Performance, Zhu et al. 2024.
https://arxiv.org/abs/2412.05270

Departs from the paper: biases and norm weights are not decayed. Written after the paper's equations
because the licence of apollo-torch excludes commercial use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lowres.core.parts import NonNegativeInt, Optimizer, PositiveFloat, PositiveInt, part
from lowres.optimizers._adam import EMBEDDING, Beta

if TYPE_CHECKING:
    import torch
    from torch import nn


@part
class Apollo(Optimizer):
    """States of a matrix (n, m) with n <= m: moments 2 r m and one number, as wide as the matrix.

    Vectors, embedding tables and matrices with a side of at most `rank` are updated by AdamW.

    Args:
        lr: Peak learning rate; the schedule scales it.
        rank: Of the random projection.
        interval: Updates after which another projection is drawn.
        scale: Factor on the scaled gradients. The paper's mini variant: rank 1, scaling tensor,
            scale 128.
        scaling: One factor for each channel (along the longer side), or for the whole matrix.
        growth: How much the norm of a scaled gradient may grow from one update to the next.
        seed: Of the projections.
    """

    refuses: ClassVar[Mapping[Literal["in_backward", "on_host", "divided"], str]] = {
        "on_host": "draws its projections where it updates, and a host draws others than a GPU, so "
        "the run would be another one; its states are small where they are: drop the lever",
        "divided": "looks at matrices, and DeepSpeed lays parameters into one vector; use adamw "
        "with this lever",
    }
    sample_fields: ClassVar[Mapping[str, Any]] = {"lr": 1e-3, "rank": 2}

    lr: PositiveFloat
    rank: PositiveInt = 256
    interval: PositiveInt = 200
    scale: PositiveFloat = 1.0
    scaling: Literal["channel", "tensor"] = "channel"
    growth: Annotated[float, Field(gt=1)] = 1.01
    seed: NonNegativeInt = 0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0

    def make(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        from lowres.optimizers import _low_rank

        return _low_rank.Apollo(
            _low_rank.groups_of(parameters, self.rank, self.weight_decay, EMBEDDING),
            self.seed, lr=self.lr, interval=self.interval, scale=self.scale, scaling=self.scaling,
            growth=self.growth, betas=self.betas, eps=self.eps,
        )  # fmt: skip
