"""Additions that each token weighs by a gate of its own. Legend: B rows, T tokens, D features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lowres.core.delta import Delta, cast, features, place
from lowres.core.recompute import WideningLinear
from lowres.methods._bottleneck import SerialAdapter
from lowres.methods._low_rank import LowRank
from lowres.methods._prefix import KeyValuePrefix


class Gate(nn.Module):
    """`sigmoid(w h + b)`, w (D,) from a narrow normal distribution, b zero: near 1/2."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.layer = WideningLinear(width, 1, device=device)
        nn.init.normal_(self.layer.weight, std=0.02)
        nn.init.zeros_(self.layer.bias)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        gate_BT1 = torch.sigmoid(self.layer(hidden_BTD))
        return gate_BT1


class GatedLowRank(LowRank):
    """`y + g(x) (alpha / R) B A x`."""

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        self.gate = Gate(features(base)[0], place(base))

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output + cast(self.gate(inputs[0]) * self.added(inputs[0]), output)

    # A gate depends on the input: there is no weight to fold it into.
    fold = Delta.fold


class GatedAdapter(SerialAdapter):
    """`y + g(y) A(y)` behind a layer whose output is y."""

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        self.gate = Gate(features(base)[1], place(base))

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output + cast(self.gate(output) * self.adapter(output), output)


class GatedPrefix(KeyValuePrefix):
    """Keys and values times g(x), x the input of the queries' layer, where it sits: there is one
    gate for each query, so that no token learns of those behind it."""

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        self.gate = Gate(features(base)[0], place(base))
        self._kept: torch.Tensor | None = None

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        self._kept = self.gate(inputs[0])
        return output

    def take_gate(self) -> torch.Tensor:
        """The gates of the queries that were computed last, (B, T, 1); they are let go of."""
        kept, self._kept = self._kept, None
        assert kept is not None, "queries come before their attention"
        return kept
