"""A trained change of the smallest weights. Legend: n entries of a matrix (o, i)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lowres.core.delta import Delta, cast, features, place
from lowres.methods._sparse import PLACES, SparseDelta, spread


class SmallDelta(SparseDelta):
    """`y + S x` at the n entries of W with the smallest magnitude, until some of them are settled.

    What is kept beside the values is held as integers of 32 bits, since numbers would be rounded
    where an adapter is cast to the type of the base.

    Settings: `n`.
    """

    start: torch.Tensor
    settled: torch.Tensor
    working: torch.Tensor

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        self.shape = features(base)[::-1]
        self.penalised = False
        count = int(settings["n"])
        there = torch.zeros(count, device=place(base))
        if there.device.type != "meta":
            there = _matrix(base).flatten()[self.entries.long()].float()
        # Kept with the entries: over a base of another type the smallest may be others.
        self.register_buffer("start", there.view(torch.int32))
        self.register_buffer("settled", torch.zeros_like(there).view(torch.int32))
        self.register_buffer("working", torch.ones_like(there, dtype=torch.bool))

    def chosen(self, base: nn.Module, count: int) -> torch.Tensor:
        if place(base).type == "meta":
            return spread(count, base)
        found = _matrix(base).abs().flatten().topk(count, largest=False, sorted=False)
        return found.indices.sort().values.to(PLACES)

    def effective(self) -> torch.Tensor:
        return torch.where(self.working, self.values, cast(self._settled(), self.values))

    def settle(self) -> None:
        """End the training of the entries that are no longer as small as the largest was."""
        start_n = self.start.view(torch.float32)
        now_n = self.effective().detach()
        still_n = (start_n + now_n).abs() <= start_n.abs().max()
        self.settled.copy_(now_n.float().view(torch.int32))
        self.working.logical_and_(still_n)

    def nuclear_norm(self) -> torch.Tensor:
        """Sum of the singular values of the matrix of the chosen weights alone, others 0."""
        now_n = self.start.view(torch.float32) + self.effective().float()
        o, i = self.shape
        flat = torch.zeros(o * i, device=now_n.device)
        matrix_oi = flat.index_put((self.entries.long(),), now_n).view(o, i)
        norm: torch.Tensor = torch.linalg.svdvals(matrix_oi).sum()
        return norm

    def _settled(self) -> torch.Tensor:
        return self.settled.view(torch.float32)


def _matrix(base: Any) -> torch.Tensor:
    """The weights (o, i)."""
    weight: torch.Tensor = base.weight.detach()
    turned: torch.Tensor = weight if hasattr(base, "in_features") else weight.t()
    return turned
