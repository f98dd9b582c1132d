"""Memory for time: what is cheap to compute is computed again in backward and not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def recompute(
    function: Callable[..., torch.Tensor],
    *inputs: torch.Tensor,
    parameters: Iterable[torch.Tensor],
) -> torch.Tensor:
    """`function(*inputs)`, of which only the inputs are kept for backward: not their copies in
    another type, nor what is made of small trained parts on the way. Nothing random may happen
    inside.

    Args:
        parameters: What the function trains; while none of it is trained, no input is kept either.
    """
    if not any(parameter.requires_grad for parameter in parameters):
        return function(*inputs)
    made: torch.Tensor = checkpoint(
        function, *inputs, use_reentrant=False, preserve_rng_state=False
    )
    return made


class WideningLinear(nn.Linear):
    """`nn.Linear` that takes its input to its weight's type.

    Backward keeps a narrower input as it came, once for all layers that share it, and not the wide
    copy of each. Under autocast, which chooses a type of its own, it is `nn.Linear`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        if x.element_size() >= self.weight.element_size():
            return super().forward(x.to(self.weight.dtype))
        made: torch.Tensor = _Widening.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return made


class _Widening(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        ctx.dtype = x.dtype
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return F.linear(x.to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        into = weight_grad = bias_grad = None
        if for_x:
            into = (grad @ weight).to(ctx.dtype)
        if for_weight:
            weight_grad = flat.t() @ x.reshape(-1, x.shape[-1]).to(weight.dtype)
        if for_bias:
            bias_grad = flat.sum(0)
        return into, weight_grad, bias_grad
