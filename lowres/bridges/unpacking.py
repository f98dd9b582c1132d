"""The weights that packed 4-bit and 8-bit values stand for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from lowres.bridges.bitsandbytes import quantisation_state


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
