"""Trained factors on a layer's output features, and a trained offset. Legend: o output features,
H heads, q rows of the queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from lowres.core.delta import Delta, features, place, undoing


class Scale(Delta):
    """`y (1 + r)(1 + h)`: r (o,) for each feature and h (H,) for each head's queries, from zero.

    Both are one factor on y, so that backward keeps y once. What is added to 1 is held, since
    16 bits do not hold a small step beside 1.

    Settings: `rows`: whether there is an r; `heads`: H, 0 for no h; `head_rows`: features of a
    head. The queries come first where y holds more.
    """

    moves_bias: ClassVar[bool] = True

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        self._features = features(base)[1]
        self._head_rows = int(settings["head_rows"])
        heads, where = int(settings["heads"]), place(base)
        self.rows = (
            nn.Parameter(torch.zeros(self._features, device=where)) if settings["rows"] else None
        )
        self.heads = nn.Parameter(torch.zeros(heads, device=where)) if heads else None

    def _less_one(self) -> torch.Tensor:
        """(1 + r)(1 + h) - 1, (o,)."""
        if self.heads is None:
            assert self.rows is not None
            return self.rows
        heads_q = self.heads.repeat_interleave(self._head_rows)
        heads_o = nn.functional.pad(heads_q, (0, self._features - heads_q.shape[0]))
        return heads_o if self.rows is None else self.rows + heads_o + self.rows * heads_o

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(output, output, self._less_one().to(output.dtype))

    def fold(self, base: nn.Module, sign: int) -> None:
        factor_o = 1 + self._less_one().data
        factor_o = factor_o if sign > 0 else undoing(factor_o)
        weight: Any = base.weight
        _multiply(weight.data, factor_o[:, None] if hasattr(base, "in_features") else factor_o)
        bias: Any = base.bias
        if bias is not None:
            _multiply(bias.data, factor_o)


class Offset(Delta):
    """`y + d`, d (o,) from zero; backward keeps nothing for it."""

    moves_bias: ClassVar[bool] = True

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        self.offset = nn.Parameter(torch.zeros(features(base)[1], device=place(base)))

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output + self.offset.to(output.dtype)

    def unfoldable(self, base: nn.Module) -> str | None:
        if base.bias is None:
            return "an offset is merged into a bias, and this model has none there"
        return None

    def fold(self, base: nn.Module, sign: int) -> None:
        bias: Any = base.bias
        bias.data.add_(self.offset.data.to(bias.dtype), alpha=sign)


def _multiply(values: torch.Tensor, factor: Any) -> None:
    """In place, in the wider of the two types."""
    wide = torch.promote_types(values.dtype, factor.dtype)
    values.copy_(values.to(wide).mul_(factor.to(values.device, wide)))
