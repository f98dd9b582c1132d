"""Tensor trains: a matrix as a chain of small cores. Legend: N rows, I input and O output features,
K size of a mode, R rank of the train, M bottleneck.

The modes of the input come first, then those of the output. The bond between them has R numbers,
so the cores before it make a thin (I, R) and those behind it a thin (R, O); the matrix itself is
made for merging alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lowres.core.delta import Delta, add_to_weight, cast, features, place
from lowres.core.recompute import recompute
from lowres.methods._bottleneck import ACTIVATIONS

# With 12 the modes of 768 and 4096 are those of the adapters in the paper's code: 8 8 12, 16 16 16.
_USUAL_MODE = 12


def modes(size: int) -> tuple[int, ...]:
    """Whole numbers near 12 whose product is `size`; fewer and larger ones where it is prime."""
    wanted = max(1, round(math.log(size, _USUAL_MODE)))
    splits = (list(_splits(size, parts, 2)) for parts in range(wanted, 0, -1))
    return min(next(found for found in splits if found), key=sum)


def _splits(size: int, parts: int, least: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `size` as so many factors, in ascending order."""
    if parts == 1:
        yield (size,)
        return
    factor = least
    while factor**parts <= size:
        if size % factor == 0:
            for rest in _splits(size // factor, parts - 1, factor):
                yield (factor, *rest)
        factor += 1


class TensorTrain(nn.Module):
    """`x W` with W (I, O) in cores (R, K, R); the ranks at both ends are 1.

    Args:
        zero: Start at W = 0, by the last core; the others move from the second update on.
    """

    def __init__(
        self, given: int, made: int, rank: int, device: torch.device, *, zero: bool = False
    ) -> None:
        super().__init__()
        before, behind = modes(given), modes(made)
        self._cut, sizes = len(before), before + behind
        ranks = (1, *[rank] * (len(sizes) - 1), 1)
        shapes = zip(ranks, sizes, ranks[1:], strict=False)
        self.cores = nn.ParameterList(nn.Parameter(torch.empty(s, device=device)) for s in shapes)
        # An entry of W is a sum of R^(cores - 1) products of as many Gaussian numbers as there are
        # cores; their spread is such that x W has the spread of x.
        paths = rank ** (len(sizes) - 1)
        spread = (1 / (given * paths)) ** (1 / (2 * len(sizes)))
        if device.type != "meta":
            for core in self.cores:
                nn.init.normal_(core, std=spread)
        if zero:
            nn.init.zeros_(self.cores[-1])

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Thin (I, R) and (R, O) whose product is W."""
        first, *others = self.cores[: self._cut]
        left_IR = first.flatten(0, 1)
        for core in others:
            left_IR = (left_IR @ core.flatten(1)).reshape(-1, core.shape[-1])
        *others, last = self.cores[self._cut :]
        right_RO = last.flatten(1)
        for core in reversed(others):
            right_RO = (core.flatten(0, 1) @ right_RO).reshape(core.shape[0], -1)
        return left_IR, right_RO

    def forward(self, x_NI: torch.Tensor) -> torch.Tensor:
        left_IR, right_RO = self.factors()
        return x_NI @ left_IR @ right_RO


class TensorTrainPair(Delta):
    """`y + (alpha / rank) TT(B) TT(A) x`.

    Settings: `rank` (M, between the two trains), `alpha`, `train_rank` (R).
    """

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        given, made = features(base)
        rank, train = int(settings["rank"]), int(settings["train_rank"])
        self.down = TensorTrain(given, rank, train, place(base))
        self.up = TensorTrain(rank, made, train, place(base), zero=True)
        self._scale = float(settings["alpha"]) / rank

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output + cast(
            recompute(self._added, inputs[0], parameters=self.parameters()), output
        )

    def _added(self, x_NI: torch.Tensor) -> torch.Tensor:
        up: torch.Tensor = self.up(self.down(cast(x_NI, self.down.cores[0])))
        return up * self._scale

    def fold(self, base: nn.Module, sign: int) -> None:
        with torch.no_grad():
            (a, b), (c, d) = self.down.factors(), self.up.factors()
            add_to_weight(base, (a @ (b @ c) @ d).T * self._scale, sign)


class TensorTrainAdapter(Delta):
    """`y + TT_up act(TT_down y + b_down) + b_up` behind a layer whose output is y.

    Settings: `bottleneck` (M), `train_rank` (R), `activation`.
    """

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        width, middle = features(base)[1], int(settings["bottleneck"])
        train, device = int(settings["train_rank"]), place(base)
        self.down = TensorTrain(width, middle, train, device)
        self.up = TensorTrain(middle, width, train, device, zero=True)
        self.down_bias = nn.Parameter(torch.zeros(middle, device=device))
        self.up_bias = nn.Parameter(torch.zeros(width, device=device))
        self._activation = ACTIVATIONS[settings["activation"]]

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output + cast(recompute(self._added, output, parameters=self.parameters()), output)

    def _added(self, y_NO: torch.Tensor) -> torch.Tensor:
        hidden_NM = self._activation(self.down(cast(y_NO, self.down_bias)) + self.down_bias)
        up: torch.Tensor = self.up(hidden_NM)
        return up + self.up_bias
