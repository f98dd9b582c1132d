"""A linear layer whose inputs and outputs are scaled. Legend: N rows, I input and O output
features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from lowres.core.delta import Delta, features, place, undoing
from lowres.core.errors import LowresError


class ScaledInput(Delta):
    """`W ((1 + s) x) + b` with s (I,) from zero, so that weight decay pulls the scale to one. The
    input is kept for backward, once for all layers that share it."""

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        self.input = nn.Parameter(torch.zeros(features(base)[0], device=place(base)))

    def around(
        self, call: Callable[..., torch.Tensor], *inputs: torch.Tensor, **others: Any
    ) -> torch.Tensor:
        x, *rest = inputs
        return call((x * (1 + self.input)).to(x.dtype), *rest, **others)

    def fold(self, base: nn.Module, sign: int) -> None:
        _scale(_weight_of(base), 1 + self.input.data, sign)


class ScaledSides(ScaledInput):
    """`(1 + t) (W ((1 + s) x)) + b` with s (I,) and t (O,) from zero."""

    keeps_bias: ClassVar[bool] = True

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        self.output = nn.Parameter(torch.zeros(features(base)[1], device=place(base)))
        self._base: nn.Module
        object.__setattr__(self, "_base", base)  # Its bias is asked for; it is not this delta's.

    def around(
        self, call: Callable[..., torch.Tensor], *inputs: torch.Tensor, **others: Any
    ) -> torch.Tensor:
        made = super().around(call, *inputs, **others)
        scale: Any = _ScaleOutput.apply
        scaled: torch.Tensor = scale(made, self.output, self._base.bias)
        return scaled

    def fold(self, base: nn.Module, sign: int) -> None:
        scale_OI = torch.outer(1 + self.output.data, 1 + self.input.data)
        _scale(_weight_of(base), scale_OI, sign)


class _ScaleOutput(torch.autograd.Function):
    """`y = z + t (z - b)`, b the bias that z has.

    Backward needs `z - b` for t and takes it from y, `(y - b) / (1 + t)`: y is what the next
    operation reads, which mostly keeps it anyway, while nobody else keeps z. An output whose scale
    is exactly 0 has lost its z, and its t waits for an update by momentum or decay.
    """

    @staticmethod
    def forward(
        ctx: Any, made_NO: torch.Tensor, change_O: torch.Tensor, bias_O: torch.Tensor | None
    ) -> torch.Tensor:
        product_NO = made_NO if bias_O is None else made_NO - bias_O
        scaled_NO = (made_NO + product_NO * change_O).to(made_NO.dtype)
        ctx.save_for_backward(scaled_NO, change_O, bias_O)
        # Counts changes of y in place without holding it: where blocks are recomputed, torch asks
        # nobody whether what it kept is still what it was.
        ctx.changes = scaled_NO.detach()
        ctx.changes.data = scaled_NO.new_empty(0)
        return scaled_NO

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.changes._version:
            raise LowresError(
                f"method 'ssb': the model changes a scaled output of {grads[0].shape[-1]} features "
                "in place, and the gradient of its scale is taken from it; leave that layer (of "
                "Falcon, dense_4h_to_h) out of method.targets"
            )
        scaled_NO, change_O, bias_O = ctx.saved_tensors
        grad_NO, scale_O = grads[0], 1 + change_O
        product_NO = scaled_NO if bias_O is None else scaled_NO - bias_O
        summed_O = (grad_NO * product_NO.to(scale_O.dtype)).flatten(0, -2).sum(0)
        of_change_O = torch.where(scale_O == 0, 0, summed_O / scale_O)
        return (grad_NO * scale_O).to(grad_NO.dtype), of_change_O, None


def _weight_of(base: Any) -> torch.Tensor:
    """(O, I), in whichever layout the layer holds it."""
    weight: torch.Tensor = base.weight.data
    return weight if hasattr(base, "in_features") else weight.T


def _scale(weight_OI: torch.Tensor, scale: torch.Tensor, sign: int) -> None:
    wide = torch.promote_types(weight_OI.dtype, scale.dtype)
    scale = scale.to(weight_OI.device, wide)
    weight_OI.copy_(weight_OI.to(wide) * (scale if sign > 0 else undoing(scale)))
