"""PEFT's layers of LoRA and DoRA with its numbers and files, and less made and kept on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from peft.tuners.lora import variants
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from lowres.bridges.unpacking import unpacked_rows
from lowres.core.errors import InputError, Problem
from lowres.core.recompute import WideningLinear, recompute


class _Lean:
    """A layer that leaves it to A to widen the input, where A can."""

    lora_A: nn.ModuleDict

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        # Another adapter that PEFT put there later has a plain A.
        if all(isinstance(down, WideningLinear) for down in self.lora_A.values()):
            return x
        return super()._cast_input_dtype(x, dtype)  # type: ignore[misc]


class LeanLinear(_Lean, Linear): ...


class Lean4bit(_Lean, Linear4bit): ...


class Lean8bit(_Lean, Linear8bitLt): ...


_LEAN: dict[type, type] = {Linear: LeanLinear, Linear4bit: Lean4bit, Linear8bitLt: Lean8bit}


class LeanDora(DoraLinearVariant):
    """DoRA without a tensor as large as the weight, where PEFT 0.21 makes the identity, B A and
    W + B A in each pass; backward keeps the input, A x and the layer's own output."""

    @staticmethod
    def init(module: Any, adapter_name: str, **_: Any) -> None:
        # In float32: PEFT's are in the base's type and divided by norms in float32, so that over 16
        # bits the start would not be the base.
        magnitude = DoraLinearLayer(fan_in_fan_out=module.fan_in_fan_out)
        magnitude.weight = nn.Parameter(row_norms(module, adapter_name))
        module.lora_magnitude_vector[adapter_name] = magnitude

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        magnitude = module.lora_magnitude_vector[active_adapter].weight
        up, scale = module.lora_B[active_adapter], module.scaling[active_adapter]
        bias = module.get_base_layer().bias
        gain = magnitude / row_norms(module, active_adapter)

        def whole(base: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
            plain = base if bias is None else base - bias
            out: torch.Tensor = base + ((gain - 1) * plain + gain * up(hidden) * scale)
            return out

        hidden = module.lora_A[active_adapter](x)
        return recompute(whole, result, hidden, parameters=(magnitude, up.weight, hidden))


@torch.no_grad()
def row_norms(layer: Any, adapter: str) -> torch.Tensor:
    """`||W + s B A||` of each row, the norm of DoRA, in float32 or wider; it has no gradient (the
    paper's section 4.3). Rows are made in slices: as exact as of the whole, unlike their square
    taken apart into those of W, B A and both, where a short row is a difference of long ones."""
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    wide = torch.promote_types(down.dtype, torch.float32)
    down, up = down.to(wide), up.to(wide)
    norms, begin = [], 0
    with torch.autocast(down.device.type, enabled=False):
        for rows in unpacked_rows(layer.get_base_layer()):
            some = up[begin : begin + len(rows)]
            changed = torch.addmm(rows.to(down), some, down, alpha=layer.scaling[adapter])
            norms.append(torch.linalg.vector_norm(changed, dim=1))
            begin += len(rows)
    return torch.cat(norms)


def making() -> contextlib.AbstractContextManager[Any]:
    """While it lasts, the magnitudes of layers that PEFT makes are ours from the start."""
    return mock.patch.object(variants, "DoraLinearVariant", LeanDora)


def settle(model: nn.Module) -> None:
    """Have layers that PEFT put in compute so, where they are LoRA or DoRA without dropout: what is
    dropped out is another input in each layer, and is made in the wide type."""
    layers: Iterator[Any] = model.modules()
    for layer in layers:
        if type(layer) not in _LEAN:
            continue
        for adapter, down in layer.lora_A.items():
            kind = type(layer.lora_variant.get(adapter))
            lean = isinstance(layer.lora_dropout[adapter], nn.Identity)
            if kind in (DoraLinearVariant, LeanDora):
                layer.lora_variant[adapter] = LeanDora() if lean else DoraLinearVariant()
            if lean and kind in (type(None), DoraLinearVariant, LeanDora):
                down.__class__ = WideningLinear
        layer.__class__ = _LEAN[type(layer)]


def stop_at_zeros(model: nn.Module) -> None:
    """Raise InputError where a row of a weight is all zeros, whose direction would be 0 / 0."""
    for path, layer in model.named_modules():
        for one in getattr(layer, "lora_magnitude_vector", {}).values():
            if not is_fake(one.weight) and not one.weight.all():
                row = int((one.weight == 0).nonzero()[0])
                text = (
                    f"row {row} of '{path}' is all zeros and has no direction to be kept; leave "
                    "that layer out (method.targets), or use lora"
                )
                raise InputError("the recipe", [Problem("method", text)])
