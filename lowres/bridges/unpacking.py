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
            packed = name == "weight" and not parameter.is_floating_point()
            yield _unpacked(layer, parameter) if packed else parameter.detach()


def _unpacked(layer: Any, packed: Any) -> torch.Tensor:
    state = getattr(packed, "quant_state", None)
    if state is not None:
        whole: torch.Tensor = bnb.functional.dequantize_4bit(packed.data, state)
        return whole
    # A row of 8 bits holds its largest magnitude as 127.
    (scales, *_) = quantisation_state(layer)
    return packed.data * (scales / 127).unsqueeze(1)
