"""A low-rank product that starts at a weight's principal part, less that part. Legend: I inputs, O
outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowres.core.delta import Delta, add_to_weight, cast, features, place
from lowres.core.recompute import recompute


class PrincipalDelta(Delta):
    """`y + (B A - B_0 A_0) x` with `B_0 A_0` the best approximation of rank R to the weight, and A
    and B trained from A_0 and B_0.

    That is training B A beside the rest of the weight, without changing the weight.

    Settings: `rank` (R), `iterations` of a randomised decomposition (0 for the exact one).
    """

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        (inputs, outputs), rank = features(base), int(settings["rank"])
        device = place(base)
        a_RI = torch.empty(rank, inputs, device=device)
        b_OR = torch.empty(outputs, rank, device=device)
        if device.type != "meta":
            from lowres.bridges.unpacking import unpacked

            weight = unpacked(base)
            weight_OI = weight if hasattr(base, "in_features") else weight.T
            left, values, right = _principal(weight_OI.float(), rank, int(settings["iterations"]))
            root = values.sqrt()
            a_RI, b_OR = root[:, None] * right.T, left * root
        self.down = nn.Parameter(a_RI.contiguous())
        self.up = nn.Parameter(b_OR.contiguous())
        self.register_buffer("down_start", a_RI.clone().contiguous())
        self.register_buffer("up_start", b_OR.clone().contiguous())

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        added = recompute(self._added, inputs[0], parameters=(self.down, self.up))
        return output + cast(added, output)

    def _added(self, x: torch.Tensor) -> torch.Tensor:
        """`(B - B_0) A x + B_0 (A - A_0) x`: small changes are not lost in the rounding of two
        large products."""
        x = cast(x, self.down)
        down_start, up_start = self._start()
        of_up = F.linear(F.linear(x, self.down), self.up - up_start)
        return of_up + F.linear(F.linear(x, self.down - down_start), up_start)

    def _start(self) -> tuple[torch.Tensor, torch.Tensor]:
        # PEFT widens parameters beside narrow weights, and no buffers.
        names = ("down_start", "up_start")
        down_start, up_start = (cast(self.get_buffer(name), self.down) for name in names)
        return down_start, up_start

    @torch.no_grad()
    def fold(self, base: nn.Module, sign: int) -> None:
        down_start, up_start = self._start()
        start_OI = up_start @ down_start
        add_to_weight(base, self.up @ self.down - start_OI, sign)


def _principal(
    weight_OI: torch.Tensor, rank: int, iterations: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values (R,) with their vectors (O, R) and (I, R)."""
    if iterations:
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.svd_lowrank(
            weight_OI, rank, iterations
        )
        return found
    left, values, right = torch.linalg.svd(weight_OI, full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank].T
