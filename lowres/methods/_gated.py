"""A dense trained change with a gate for each weight. Legend: o output, i input features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowres.core.delta import Delta, add_to_weight, cast, features, place

STRETCH = (-1.5, 1.5)
"""The authors' code."""
SURE = 1e4
"""A log alpha whose gate is exactly 1, or negated exactly 0, whatever is drawn."""
_EDGE = 1e-4


class GatedDelta(Delta):
    """`y + (z o w) x`, z in [0, 1] hard concrete: drawn anew in training, else what is usual of it.

    What is trained of a gate is its shift: `log alpha = start + rate shift`.

    Settings: `log_alpha`: of every gate at the start; `gate_rate`.
    """

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        i, o = features(base)
        self.change_oi = nn.Parameter(torch.zeros(o, i, device=place(base)))
        self.shift_oi = nn.Parameter(torch.zeros_like(self.change_oi))
        self._start, self._rate = float(settings["log_alpha"]), float(settings["gate_rate"])

    def log_alpha(self) -> torch.Tensor:
        """(o, i)."""
        return self._start + self._rate * self.shift_oi

    def gates(self) -> torch.Tensor:
        """z."""
        logits = self.log_alpha()
        if self.training:
            drawn = torch.rand_like(logits).clamp_(_EDGE, 1 - _EDGE)
            logits = logits + drawn.logit_()
        low, high = STRETCH
        return (logits.sigmoid() * (high - low) + low).clamp(0, 1)

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        added = F.linear(cast(inputs[0], self.change_oi), self.gates() * self.change_oi)
        return output + cast(added, output)

    def expected_gates(self) -> torch.Tensor:
        """The expected number of gates above 0."""
        low, high = STRETCH
        return (self.log_alpha() - math.log(-low / high)).sigmoid().sum().float()

    @torch.no_grad()
    def usual(self) -> torch.Tensor:
        """z o w without a draw."""
        low, high = STRETCH
        gates = (self.log_alpha().sigmoid() * (high - low) + low).clamp_(0, 1)
        return gates.mul_(self.change_oi)

    @torch.no_grad()
    def prune(self, threshold: torch.Tensor) -> None:
        """Keep what is at least as large, with its gate open; close the gates of the rest."""
        usual_oi = self.usual()
        # Where closed gates leave fewer than were asked for, the threshold is 0.
        kept_oi = (usual_oi.abs() >= threshold) & (usual_oi != 0)
        self.change_oi.copy_(usual_oi * kept_oi)
        sure_oi = kept_oi.to(usual_oi.dtype).mul_(2).sub_(1).mul_(SURE)
        self.shift_oi.copy_((sure_oi - self._start) / self._rate)

    def fold(self, base: nn.Module, sign: int) -> None:
        add_to_weight(base, self.usual(), sign)
