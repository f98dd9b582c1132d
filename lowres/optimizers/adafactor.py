"""Adam's second moments as one number a row and one a column; no first moments.

Paper: Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, Shazeer and Stern 2018.
https://arxiv.org/abs/1804.04235

Departs from the paper: the recipe's schedule takes the place of its step size min(0.01, 1/sqrt(t)).
transformers' Adafactor is taken because torch's has eps1 elsewhere than the paper's equations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lowres.core.parts import Optimizer, PositiveFloat, part
from lowres.optimizers._decay import groups

if TYPE_CHECKING:
    import torch
    from torch import nn


@part
class Adafactor(Optimizer):
    """States of a matrix (n, m): 4 (n + m) bytes; of a vector as of Adam's second moment.

    Args:
        lr: Peak learning rate; relative to each parameter's size where `scale_parameter` says so.
        eps: Added to squared gradients, and the least size of a parameter.
        clip_threshold: Updates of a larger root mean square are scaled down to it.
        decay_rate: The average of squared gradients forgets with 1 - t ** decay_rate.
        beta1: Of first moments, as large as the parameter; None for none.
        scale_parameter: Multiply steps by the root mean square of the parameter.
        weight_decay: Of matrices; biases, norm weights and entries kept as a list are not decayed.
    """

    refuses: ClassVar[Mapping[Literal["in_backward", "on_host", "divided"], str]] = {
        "divided": "looks at matrices, and DeepSpeed lays parameters into one vector; use adamw "
        "with this lever",
    }
    sample_fields: ClassVar[Mapping[str, Any]] = {"lr": 1e-2}

    lr: PositiveFloat
    eps: tuple[PositiveFloat, PositiveFloat] = (1e-30, 1e-3)
    clip_threshold: PositiveFloat = 1.0
    decay_rate: Annotated[float, Field(lt=0)] = -0.8
    beta1: Annotated[float, Field(ge=0, lt=1)] | None = None
    scale_parameter: bool = True
    weight_decay: Annotated[float, Field(ge=0)] = 0.0

    def make(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        from lowres.bridges import adafactor

        made: torch.optim.Optimizer = adafactor.Adafactor(
            groups(parameters, self.weight_decay),
            lr=self.lr,
            eps=self.eps,
            clip_threshold=self.clip_threshold,
            decay_rate=self.decay_rate,
            beta1=self.beta1,
            scale_parameter=self.scale_parameter,
            relative_step=False,
        )
        return made
