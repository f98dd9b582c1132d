"""The linear layer that DeepSpeed's ZeRO stage 3 puts in the place of torch's, for a plan: it keeps
its input for backward also where its weight is frozen, and its weight as the parameter itself.

Source: deepspeed 0.19, runtime/zero/linear.py (`LinearFunctionForZeroStage3`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F

Whole = Callable[[torch.Tensor], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def in_place_of_linear(whole: Whole) -> Iterator[None]:
    """While it lasts, `torch.nn.functional.linear` is DeepSpeed's.

    Args:
        whole: Puts a weight together where it is divided.
    """

    def linear(given: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        made: torch.Tensor = _Linear.apply(given, weight, bias, whole)
        return made

    with mock.patch.object(F, "linear", linear):
        yield


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, whole: Whole
    ) -> torch.Tensor:
        ctx.save_for_backward(given, weight, bias)
        ctx.whole = whole
        if given.dim() == 2 and bias is not None:
            return torch.addmm(bias, given, weight.t())
        made = given.matmul(weight.t())
        if bias is not None:
            made += bias
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        given, weight, bias = ctx.saved_tensors
        for_given, for_weight, for_bias, _ = ctx.needs_input_grad
        of_given = of_weight = of_bias = None
        with ctx.whole(weight):
            if for_given:
                of_given = gradient.matmul(weight)
            if for_weight:
                rows = gradient.reshape(-1, gradient.shape[-1])
                of_weight = rows.t().matmul(given.reshape(-1, given.shape[-1]))
            if bias is not None and for_bias:
                of_bias = gradient.sum(list(range(gradient.dim() - 1)))
        return of_given, of_weight, of_bias, None
