"""Bottleneck adapters. Legend: B rows, T tokens, D features, M bottleneck."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowres.core.delta import Delta, Tap, cast, features, nearest, place
from lowres.core.recompute import WideningLinear

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "swish": F.silu, "tanh": torch.tanh,
}  # fmt: skip


class Bottleneck(nn.Module):
    """`W_up act(W_down x + b_down) + b_up`, W_down (M, D) Kaiming-uniform, W_up (D, M) zero."""

    def __init__(self, width: int, middle: int, activation: str, device: torch.device) -> None:
        super().__init__()
        self.down = WideningLinear(width, middle, device=device)
        self.up = nn.Linear(middle, width, device=device)
        self._activation = ACTIVATIONS[activation]
        if device.type != "meta":
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    @classmethod
    def at(cls, base: nn.Module, settings: Mapping[str, Any]) -> Bottleneck:
        """As wide as the output of a linear layer."""
        width = features(base)[1]
        middle = settings.get("units") or max(1, width // int(settings["reduction"]))
        return cls(width, middle, settings["activation"], place(base))

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        hidden_BTM = self._activation(self.down(hidden_BTD))
        up: torch.Tensor = self.up(hidden_BTM)
        return up


class SerialAdapter(Delta):
    """`y + A(y)` behind a layer whose output is y.

    Settings: `reduction` (D / M) or `units` (M), `activation`.
    """

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        self.adapter = Bottleneck.at(base, settings)

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output + cast(self.adapter(output), output)


class ParallelAdapter(Delta):
    """`y + s A(x)` at the last layer of a part whose input x a Tap has kept.

    Settings: `reduction` (D / M), `activation`, `scale` (s), `learned`: whether s is trained.
    """

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        tap = nearest(before, Tap)
        assert isinstance(tap, Tap), "a Tap goes to the first layer of the part"
        self._tap: Tap
        self.borrow("_tap", tap)
        self.adapter = Bottleneck.at(base, settings)
        scale = torch.full((1,), float(settings["scale"]), device=place(base))
        self.scale = nn.Parameter(scale) if settings["learned"] else float(settings["scale"])

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        added = self.adapter(self._tap.take())
        return output + cast(added * self.scale, output)
