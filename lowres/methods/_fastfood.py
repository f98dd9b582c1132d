"""Fastfood: random maps of structure H G Pi H B. Legend: N rows, I input and O output features,
P a power of two no smaller than both, C chunks of P numbers.

H is the orthonormal Walsh-Hadamard matrix, B random signs, Pi a permutation, G Gaussian numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowres.core.delta import Delta, add_to_weight, cast, features, first, place
from lowres.core.recompute import recompute

_STEPS = 4096
"""Of the Gaussian numbers in one: as whole numbers they are not rounded when a model is cast."""


def hadamard(size: int) -> torch.Tensor:
    """The Walsh-Hadamard matrix of a power of two, in Sylvester's order: 1 and -1."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


class Hadamard(nn.Module):
    """`x H` over the last dimension, orthonormal, by two small products instead of one of P x P:
    H of P1 P2 is the Kronecker product of those of P1 and of P2."""

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__()
        half = 1 << (size.bit_length() - 1) // 2
        self.register_buffer("outer", hadamard(half).to(device), persistent=False)
        self.register_buffer("inner", hadamard(size // half).to(device), persistent=False)
        self.outer: torch.Tensor
        self.inner: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        folded = x.reshape(*x.shape[:-1], len(self.outer), len(self.inner))
        made = self.outer.to(x.dtype) @ (folded @ self.inner.to(x.dtype))
        return made.flatten(-2) / math.sqrt(x.shape[-1])


class FastfoodDelta(Delta):
    """`y + l dW x`: dW is a sum of P fixed rank-one matrices, a row of H by a shuffled row of H B,
    of which Fastfood makes the P coefficients from the vector that all layers share.

    The vector lies in the first delta. What is random follows from the seed and the delta's place
    in the model, is held in 12 P bytes and one for each number of the vector, and is not saved.

    Settings: `dimension` of the shared vector, `seed`.
    """

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        device, dimension = place(base), int(settings["dimension"])
        self._given, self._made = features(base)
        self._owner: FastfoodDelta
        owner = first(before, FastfoodDelta)
        if owner is None:
            self.theta = nn.Parameter(torch.zeros(dimension, device=device))
        self.borrow("_owner", owner or self)
        self.scale = nn.Parameter(torch.ones(1, device=device))
        size = 1 << max(1, (max(self._given, self._made) - 1).bit_length())
        chunks = -(-dimension // size)
        self._padding = chunks * size - dimension
        # In this way dW has the norm of the shared vector, as each tensor's change in the paper.
        self._norm = size / math.sqrt(self._given * self._made)
        self.hadamard = Hadamard(size, device)
        count = sum(isinstance(delta, FastfoodDelta) for delta in before)
        # The generator of a CPU reads 32 bits of its seed.
        mixed = (int(settings["seed"]) * 1_000_003 + count) % (1 << 32)
        draw = torch.Generator().manual_seed(mixed)
        gauss = torch.randn(size, generator=draw, device="cpu").clamp(-7, 7) * _STEPS
        for name, drawn in {
            "signs": self._signs((chunks, size), draw),
            "order": torch.randperm(size, generator=draw, device="cpu").int(),
            "gauss": gauss.round().to(torch.int16),
            "input_signs": self._signs((size,), draw),
            "input_order": torch.randperm(size, generator=draw, device="cpu").int(),
        }.items():
            self.register_buffer(name, drawn.to(device), persistent=False)
        self.signs: torch.Tensor
        self.order: torch.Tensor
        self.gauss: torch.Tensor
        self.input_signs: torch.Tensor
        self.input_order: torch.Tensor

    @staticmethod
    def _signs(shape: tuple[int, ...], draw: torch.Generator) -> torch.Tensor:
        bits = torch.randint(2, shape, generator=draw, dtype=torch.int8, device="cpu")
        return bits * 2 - 1

    def coefficients(self) -> torch.Tensor:
        """`H G Pi H B theta` (P,); where theta is longer, chunks of it are added up."""
        theta = self._owner.theta
        folded_CP = F.pad(theta, (0, self._padding)).view(self.signs.shape)
        mixed_P = self.hadamard((folded_CP * self.signs).sum(0)).index_select(0, self.order)
        made: torch.Tensor = self.hadamard(mixed_P * (self.gauss.to(theta.dtype) / _STEPS))
        return made

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        added = recompute(self._added, inputs[0], parameters=(self._owner.theta, self.scale))
        return output + cast(added, output)

    def _added(self, x: torch.Tensor) -> torch.Tensor:
        wide = F.pad(cast(x, self.scale), (0, len(self.input_signs) - self._given))
        # On a CPU `index_select` takes more than ten times as long along the last dimension.
        order = self.input_order.long().expand(wide.shape)
        mixed = self.hadamard(wide * self.input_signs).gather(-1, order)
        added: torch.Tensor = self.hadamard(mixed * (self.coefficients() * self.scale * self._norm))
        return added[..., : self._made]

    def fold(self, base: nn.Module, sign: int) -> None:
        with torch.no_grad():
            identity = torch.eye(self._given, device=self.scale.device, dtype=self.scale.dtype)
            add_to_weight(base, self._added(identity).T, sign)
