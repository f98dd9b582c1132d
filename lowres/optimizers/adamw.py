"""Adam with decoupled weight decay; two states for each trained parameter.

Paper: Decoupled Weight Decay Regularization, Loshchilov and Hutter 2017.
https://arxiv.org/abs/1711.05101

Departs from the paper: biases and norm weights are not decayed (as transformers does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lowres.core.parts import Optimizer, PositiveFloat, part
from lowres.optimizers._adam import Beta
from lowres.optimizers._decay import groups

if TYPE_CHECKING:
    import torch
    from torch import nn


@part
class Adamw(Optimizer):
    """torch's AdamW.

    Args:
        lr: Peak learning rate; the schedule scales it.
        implementation: `fused` makes no parameter-sized temporary; `foreach` makes one of the size
            of all trained parameters; `loop` is slowest.
    """

    sample_fields: ClassVar[Mapping[str, Any]] = {"lr": 1e-3}
    searched: ClassVar[bool] = True

    lr: PositiveFloat
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    implementation: Literal["fused", "foreach", "loop"] = "fused"

    def make(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(
            groups(parameters, self.weight_decay),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=self.implementation == "fused",
            foreach=self.implementation == "foreach",
        )
