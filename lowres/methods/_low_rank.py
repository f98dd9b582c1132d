"""A low-rank product beside a linear layer. Legend: i and o features in and out, R rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lowres.core.delta import Delta, add_to_weight, cast, features, place
from lowres.core.recompute import WideningLinear


class LowRank(Delta):
    """`y + (alpha / R) B A x`, A (R, i) Kaiming-uniform, B (o, R) zero.

    Settings: `rank` (R), `alpha`.
    """

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        wide_in, wide_out = features(base)
        rank, device = int(settings["rank"]), place(base)
        self.a = WideningLinear(wide_in, rank, bias=False, device=device)
        self.b = nn.Linear(rank, wide_out, bias=False, device=device)
        nn.init.kaiming_uniform_(self.a.weight, a=5**0.5)
        nn.init.zeros_(self.b.weight)
        self.scale = float(settings["alpha"]) / rank

    def added(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.b(self.a(x)) * self.scale
        return out

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output + cast(self.added(inputs[0]), output)

    def fold(self, base: nn.Module, sign: int) -> None:
        add_to_weight(base, self.scale * (self.b.weight.data @ self.a.weight.data), sign)
