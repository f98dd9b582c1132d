"""A trained vector added to a module's output. Legend: o output features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from lowres.core.delta import Delta


class BiasDelta(Delta):
    """`y + d` with d (o,) from zero; the backward pass keeps nothing for it."""

    moves_bias: ClassVar[bool] = True

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        bias = base.bias
        assert isinstance(bias, torch.Tensor)
        self.bias = nn.Parameter(torch.zeros_like(bias))
        # Channels come before the places of an image (the patches of a vision transformer).
        weight: Any = base.weight
        convolves = isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        self._behind = weight.dim() - 2 if convolves else 0

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        bias = self.bias.to(output.dtype)
        return output + bias.view(-1, *(1,) * self._behind)

    def fold(self, base: nn.Module, sign: int) -> None:
        bias = base.bias
        assert isinstance(bias, torch.Tensor)
        bias.data.add_(self.bias.data.to(bias.dtype), alpha=sign)
