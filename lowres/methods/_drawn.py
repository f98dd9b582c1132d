"""A trained change of weights at places drawn from a seed. Legend: n entries of a matrix (o, i)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lowres.core.delta import Delta, features, place
from lowres.methods._sparse import PLACES, SparseDelta, spread


class DrawnDelta(SparseDelta):
    """`y + S x` at n entries drawn evenly, without any twice, in the order of the matrix.

    Settings: `n`, `seed`.
    """

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        self._seed = int(settings["seed"])
        super().__init__(base, settings, before)

    def chosen(self, base: nn.Module, count: int) -> torch.Tensor:
        if place(base).type == "meta":
            return spread(count, base)
        draw = torch.Generator().manual_seed(self._seed)
        # As PEFT draws them: the same seed gives the same places.
        found = torch.randperm(math.prod(features(base)), generator=draw, device="cpu")
        return found[:count].sort().values.to(place(base), PLACES)
