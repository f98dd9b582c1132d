"""A linear layer that is used slice by slice: the gradients of its weight in one tensor.

Autograd adds what comes of several uses of a weight into a new tensor each time, so that three of
the weight's size are there at once: the sum so far, what is added and the new sum. Here products
are added where the sum lies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def used_in_slices(
    layer: nn.Module, slices: int, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer itself, or a function of the same values whose weight gets its gradient with the
    last of the slices, each of which must be gone through backward once.

    What has hooks is left alone, for they look at the layer; autocast makes one narrow copy for all
    uses of a parameter, and of nothing else.

    Args:
        slices: That will be given to it.
        device: Of what is given to it.
    """
    if (
        slices < 2
        or type(layer) is not nn.Linear
        or not layer.weight.requires_grad
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or torch.is_autocast_enabled(device.type)
    ):
        return layer
    weight, bias, together = layer.weight, layer.bias, _Together(slices)

    def used(given_KI: torch.Tensor) -> torch.Tensor:
        out = _Linear.apply(given_KI, weight, bias, together)  # type: ignore[no-untyped-call]
        return cast("torch.Tensor", out)

    return used


class _Together:
    """Takes up the gradients of a weight (O, I) until all have come."""

    def __init__(self, uses: int) -> None:
        self._left = uses
        self._sum_OI: torch.Tensor | None = None

    def add(self, gradient_KO: torch.Tensor, given_KI: torch.Tensor) -> torch.Tensor | None:
        """The sum, once; nothing before."""
        if self._sum_OI is None:
            self._sum_OI = gradient_KO.t() @ given_KI
        else:
            self._sum_OI.addmm_(gradient_KO.t(), given_KI)
        self._left -= 1
        if self._left:
            return None
        made, self._sum_OI = self._sum_OI, None
        return made


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        given_KI: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        together: _Together,
    ) -> torch.Tensor:
        ctx.save_for_backward(given_KI, weight_OI)
        ctx.together = together
        return F.linear(given_KI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_KO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        given_KI, weight_OI = ctx.saved_tensors
        of_given, _, of_bias, _ = ctx.needs_input_grad
        return (
            gradient_KO @ weight_OI if of_given else None,
            ctx.together.add(gradient_KO, given_KI),
            gradient_KO.sum(0) if of_bias else None,
            None,
        )
