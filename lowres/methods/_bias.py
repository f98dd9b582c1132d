"""A trained vector added to a module's output. Legend: o output features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lowres.core.delta import Delta


class BiasDelta(Delta):
    """`y + d` with d (o,) from zero; the backward pass keeps nothing for it."""

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        bias = base.bias
        assert isinstance(bias, torch.Tensor)
        self.bias = nn.Parameter(torch.zeros_like(bias))

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output + self.bias.to(output.dtype)

    def fold(self, base: nn.Module, sign: int) -> None:
        bias = base.bias
        assert isinstance(bias, torch.Tensor)
        bias.data.add_(self.bias.data.to(bias.dtype), alpha=sign)
