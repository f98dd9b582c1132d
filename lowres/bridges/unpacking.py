"""The weights that packed 4-bit and 8-bit values stand for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from lowres.bridges.bitsandbytes import quantisation_state
from lowres.core.delta import features


def weights_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Every parameter below a module, packed ones unpacked, one at a time."""
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            yield unpacked(layer) if name == "weight" else parameter.detach()


def unpacked(layer: Any) -> torch.Tensor:
    """The weight of one layer as it is held, or what its packed values stand for."""
    packed = layer.weight
    if packed.is_floating_point():
        plain: torch.Tensor = packed.detach()
        return plain
    state = getattr(packed, "quant_state", None)
    if state is not None:
        whole: torch.Tensor = bnb.functional.dequantize_4bit(packed.data, state)
        return whole
    # A row of 8 bits holds its largest magnitude as 127.
    (scales, *_) = quantisation_state(layer)
    return packed.data * (scales / 127).unsqueeze(1)


def unpacked_rows(layer: Any, at_most: int = 2**20) -> Iterator[torch.Tensor]:
    """The weight as (outputs, inputs) in slices of rows, unpacked one at a time.

    Args:
        at_most: Weights of a slice, unless a row or what is packed together has more.
    """
    packed, (inputs, outputs) = layer.weight, features(layer)
    state = getattr(packed, "quant_state", None)
    step = max(1, at_most // inputs)
    if packed.is_floating_point():
        plain = packed.detach()
        yield from (plain if hasattr(layer, "in_features") else plain.T).split(step)
    elif state is None:
        (scales, *_) = quantisation_state(layer)
        for values, scale in zip(packed.data.split(step), scales.split(step), strict=True):
            yield values * (scale / 127).unsqueeze(1)
    else:
        scales = state.absmax
        if state.nested:
            scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
        # A slice is to begin with a block.
        whole = state.blocksize // math.gcd(inputs, state.blocksize)
        step = -(-step // whole) * whole
        for begin in range(0, outputs, step):
            rows = min(step, outputs - begin)
            first, last = begin * inputs, (begin + rows) * inputs
            part = bnb.functional.QuantState(
                absmax=scales[first // state.blocksize : -(-last // state.blocksize)],
                shape=torch.Size((rows, inputs)),
                dtype=state.dtype,
                blocksize=state.blocksize,
                quant_type=state.quant_type,
            )
            codes = packed.data.flatten()[first // 2 : -(-last // 2)].unsqueeze(1)
            yield bnb.functional.dequantize_4bit(codes, part)
