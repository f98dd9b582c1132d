"""Matrices held in 16 bits in a model of a wider type, and multiplied in the type of their input.

The matrices are those of linear and embedding layers that come with the checkpoint. What is made
anew for a task and what transformers asks to be left alone (T5's `wo`) keep the model's type.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Container, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def left_alone(model: nn.Module) -> set[str]:
    """Parts of paths whose weights transformers asks to be held in float32."""
    return {
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    }


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer of any make."""
    return isinstance(module, nn.Linear | Conv1D)


def matrices(model: nn.Module, fresh: Container[str] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Name of the weight and layer, for each matrix that may be held in 16 bits."""
    alone = left_alone(model)
    for path, module in model.named_modules():
        name = f"{path}.weight"
        # A linear layer with a forward of its own would not multiply as ours does.
        linear = type(module) in (nn.Linear, Conv1D, NarrowLinear, NarrowConv1D)
        if not linear and not isinstance(module, nn.Embedding):
            continue
        if name not in fresh and not alone & set(path.split(".")):
            yield name, module


@contextlib.contextmanager
def reading_in(dtype: str | None) -> Iterator[None]:
    """Let `from_pretrained` convert each matrix to this type as it is read."""
    if dtype is None:
        yield
        return
    plain = PreTrainedModel._get_dtype_plan

    def plan(self: PreTrainedModel, wanted: torch.dtype) -> dict[str, torch.dtype]:
        # transformers 5.23 searches names for these patterns.
        ours = {f"^{re.escape(name)}$": getattr(torch, dtype) for name, _ in matrices(self)}
        return plain(self, wanted) | ours

    with mock.patch.object(PreTrainedModel, "_get_dtype_plan", plan):
        yield


def settle(model: nn.Module, dtype: str | None, wide: str, fresh: Container[str]) -> None:
    """Hold the matrices in `dtype`, and have their layers give what the model computes in.

    Args:
        dtype: None leaves the model as it is.
        wide: The model's own type.
        fresh: Names of parameters that keep it.
    """
    if dtype is None:
        return
    for _, module in list(matrices(model, fresh)):
        weight = module.weight
        if weight.dtype != getattr(torch, dtype):
            weight.data = weight.data.to(getattr(torch, dtype))
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(functools.partial(_widen, getattr(torch, wide)))
        else:
            module.__class__ = NarrowConv1D if isinstance(module, Conv1D) else NarrowLinear


def _widen(dtype: torch.dtype, _module: nn.Module, _inputs: Any, output: Any) -> Any:
    return output.to(dtype)


class NarrowLinear(nn.Linear):
    """`nn.Linear` whose weight is widened while it is multiplied with, and not kept so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _product(x, self.weight, self.bias, transposed=False)


class NarrowConv1D(Conv1D):
    """The same of GPT-2's layer, whose weight is (inputs, outputs)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _product(x, self.weight, self.bias, transposed=True)


def as_linear_takes(
    x: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Input and bias in autocast's type where it is on, else in the input's."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return x.to(dtype), None if bias is None else bias.to(dtype)


def _product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    x, bias = as_linear_takes(x, bias)
    if weight.dtype == x.dtype:
        return F.linear(x, weight.t() if transposed else weight, bias)
    # Of rows that are flat the product is no view, so that what is made may be added to in place.
    flat: torch.Tensor = _Widened.apply(x.reshape(-1, x.shape[-1]), weight, bias, transposed)
    return flat.view(*x.shape[:-1], flat.shape[-1])


class _Widened(torch.autograd.Function):
    """Autograd would keep the widened copy of every layer until the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any, transposed: bool
    ) -> Any:
        ctx.transposed = transposed
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        with torch.autocast(x.device.type, enabled=False):
            wide = weight.to(x.dtype)
            return F.linear(x, wide.t() if transposed else wide, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        into = weight_grad = bias_grad = None
        with torch.autocast(grad.device.type, enabled=False):
            if for_x:
                wide = weight.to(grad.dtype)
                into = grad @ (wide.t() if ctx.transposed else wide)
                del wide
            flat = grad.reshape(-1, grad.shape[-1])
            if for_weight:
                seen = x.reshape(-1, x.shape[-1])
                product = seen.t() @ flat if ctx.transposed else flat.t() @ seen
                weight_grad = product.to(weight.dtype)
            if for_bias:
                bias_grad = flat.sum(0)
        return into, weight_grad, bias_grad, None
