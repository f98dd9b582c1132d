"""Products with Kronecker products that are never built: (A x B) x, and sums of them with shared A.

Legend: a vector of i = Q V features is read as a matrix (Q, V), and the o = P U features of the
result as (P, U); A (P, Q), B (U, V) = (U, R) (R, V) where it has rank R; J terms of a sum; D, M as
in `_bottleneck`. Then (A x B) x is A X B^T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowres.core.delta import Delta, Tap, add_to_weight, cast, features, first, nearest, place
from lowres.core.recompute import recompute
from lowres.methods._bottleneck import ACTIVATIONS


def near_square(size: int) -> tuple[int, int]:
    """The two factors of a number that are nearest to each other, the smaller first."""
    small = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return small, size // small


def _as_matrix(vector: torch.Tensor, rows: int) -> torch.Tensor:
    return vector.reshape(*vector.shape[:-1], rows, -1)


def _turned(matrix: torch.Tensor) -> torch.Tensor:
    # Copied here, since a product of what does not lie in order copies it or not by whether its
    # factor is trained, and its last bits would differ.
    return matrix.transpose(-1, -2).contiguous()


class Kronecker(nn.Module):
    """`(A x B) x` with sizes of A and B as near to each other as they come, those of B larger.

    Args:
        rank: R. B is held whole where its rank could not be twice as large; None for always.
    """

    def __init__(self, given: int, made: int, rank: int | None, device: torch.device) -> None:
        super().__init__()
        (p, u), (self._q, self._v) = near_square(made), near_square(given)
        shapes = [(u, self._v)]
        if rank is not None and 2 * rank < max(u, self._v):
            shapes = [(u, rank), (rank, self._v)]
        self.first = nn.Parameter(torch.empty(p, self._q, device=device))
        self.second = nn.ParameterList(torch.zeros(shape, device=device) for shape in shapes)
        if device.type != "meta":
            nn.init.normal_(self.first, std=self._q**-0.5)
            for further in list(self.second)[1:]:
                nn.init.kaiming_uniform_(further, a=5**0.5)

    def forward(self, given_BTi: torch.Tensor) -> torch.Tensor:
        *up, down = self.second
        # A comes second: before it, B (or what of it is narrow) takes its input as it lies.
        hidden = F.linear(_as_matrix(given_BTi, self._q), down)
        hidden = _turned(F.linear(_turned(hidden), self.first))
        for factor in up:
            hidden = F.linear(hidden, factor)
        return hidden.flatten(-2)

    def dense(self) -> torch.Tensor:
        """The matrix (o, i)."""
        second = self.second[0] if len(self.second) == 1 else self.second[0] @ self.second[1]
        return torch.kron(self.first, second)


class KroneckerDelta(Delta):
    """`W x + s (A x B) x` at a linear layer.

    Settings: `rank` (R or None), `scale` (s).
    """

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        self.product = Kronecker(*features(base), settings["rank"], place(base))
        self._scale = float(settings["scale"])

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        added = recompute(self._added, inputs[0], parameters=self.parameters())
        return output + cast(added, output)

    def _added(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.product(cast(x, self.product.first))
        return made * self._scale

    @torch.no_grad()
    def fold(self, base: nn.Module, sign: int) -> None:
        add_to_weight(base, self.product.dense() * self._scale, sign)


class KroneckerBeside(Delta):
    """`y + s (A x B) x + s_res x` at the last layer of a part whose input x a Tap has kept.

    Settings: `scale` (s), `residual`: whether there is the last term.
    """

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        tap = nearest(before, Tap)
        assert isinstance(tap, Tap), "a Tap goes to the first layer of the part"
        self._tap: Tap
        self.borrow("_tap", tap)
        width = features(base)[1]
        self.product = Kronecker(width, width, None, place(base))
        self._scale = float(settings["scale"])
        share = torch.zeros(1, device=place(base))
        self.share = nn.Parameter(share) if settings["residual"] else None

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        added = recompute(self._added, self._tap.take(), parameters=self.parameters())
        return output + cast(added, output)

    def _added(self, x: torch.Tensor) -> torch.Tensor:
        given = cast(x, self.product.first)
        made: torch.Tensor = self.product(given) * self._scale
        return made if self.share is None else torch.addcmul(made, given, self.share)


class Hypercomplex(nn.Module):
    """`sum over j of (A_j x s_j t_j) x + b`, with A (J, J, J) given at each call, s_j (U, R) and
    t_j (R, V) Glorot-uniform.

    Args:
        still: Whether s starts at zero instead.
    """

    def __init__(
        self, given: int, made: int, terms: int, rank: int, still: bool, device: torch.device
    ) -> None:
        super().__init__()
        self._terms, self._rank = terms, rank
        self.up = nn.Parameter(torch.zeros(made // terms, terms * rank, device=device))
        self.down = nn.Parameter(torch.zeros(terms * rank, given // terms, device=device))
        self.bias = nn.Parameter(torch.zeros(made, device=device))
        if device.type != "meta":
            drawn = [*torch.split(self.down.data, rank)]
            drawn += [] if still else torch.split(self.up.data, rank, 1)
            for one in drawn:
                nn.init.xavier_uniform_(one)

    def forward(self, given_BTi: torch.Tensor, rule_JPQ: torch.Tensor) -> torch.Tensor:
        terms = self._terms
        hidden = F.linear(_as_matrix(given_BTi, terms), self.down)
        hidden = torch.einsum("...qjr,jpq->...pjr", _as_matrix(hidden, terms), rule_JPQ)
        return F.linear(hidden.flatten(-2), self.up).flatten(-2) + self.bias

    def dense(self, rule_JPQ: torch.Tensor) -> torch.Tensor:
        """The matrix (o, i)."""
        parts = zip(rule_JPQ, torch.split(self.up, self._rank, 1),
                    torch.split(self.down, self._rank),
                    strict=True)  # fmt: skip
        return torch.stack([torch.kron(a, s @ t) for a, s, t in parts]).sum(0)


class Rule(nn.Module):
    """The A_j that all adapters share. With less than 0.01 the first gradients would drown in the
    epsilon of Adam."""

    def __init__(self, terms: int, device: torch.device) -> None:
        super().__init__()
        self.terms_JPQ = nn.Parameter(torch.zeros(terms, terms, terms, device=device))
        if device.type != "meta":
            nn.init.normal_(self.terms_JPQ, std=0.01)


class HypercomplexAdapter(Delta):
    """`y + up(act(down(y)))` behind a layer whose output is y, both of them Hypercomplex.

    Settings: `reduction` (D / M), `activation`, `terms` (J), `rank` (R).
    """

    shared = ("rule",)

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        terms, rank, device = int(settings["terms"]), int(settings["rank"]), place(base)
        width = features(base)[1]
        middle = max(terms, width // int(settings["reduction"]) // terms * terms)
        owner = first(before, HypercomplexAdapter)
        if owner is None:
            owner = self
            self.rule = Rule(terms, device)
        self._owner: HypercomplexAdapter
        self.borrow("_owner", owner)
        self.down = Hypercomplex(width, middle, terms, rank, False, device)
        self.up = Hypercomplex(middle, width, terms, rank, True, device)
        self._activation = ACTIVATIONS[settings["activation"]]

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        trained = (*self.parameters(), self._owner.rule.terms_JPQ)
        return output + cast(recompute(self._added, output, parameters=trained), output)

    def _added(self, y: torch.Tensor) -> torch.Tensor:
        rule = self._owner.rule.terms_JPQ
        hidden = self._activation(self.down(cast(y, self.down.down), rule))
        up: torch.Tensor = self.up(hidden, rule)
        return up
