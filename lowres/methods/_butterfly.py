"""Orthogonal butterfly products on a layer's input.

Legend: I inputs, O outputs, M factors, N blocks of b features, E entries of half a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from lowres.core.delta import Delta, cast, features, place, undoing
from lowres.core.recompute import recompute


class ButterflyDelta(Delta):
    """`s * (W (R x)) + bias`: R a product of M orthogonal matrices, each block-diagonal but for the
    order of features; s (O,) from 1.

    Only the layer itself is asked for W x, so it may be packed.

    Settings: `block_size` (b), `factors` (M).
    """

    keeps_bias: ClassVar[bool] = True

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        inputs, outputs = features(base)
        b, factors, device = int(settings["block_size"]), int(settings["factors"]), place(base)
        entries = b * (b - 1) // 2
        self.skew = nn.Parameter(torch.zeros(factors, inputs // b, entries, device=device))
        self.scale = nn.Parameter(torch.ones(outputs, device=device))
        self._b = b
        self._base: nn.Module
        # For its bias; what belongs to the model is not registered here.
        object.__setattr__(self, "_base", base)

    def around(
        self, call: Callable[..., torch.Tensor], *inputs: torch.Tensor, **others: Any
    ) -> torch.Tensor:
        x, *rest = inputs
        rotated = recompute(self._rotated, x, parameters=(self.skew,))
        output = call(rotated, *rest, **others)
        bias = self._base.bias
        product = output if bias is None else output - cast(bias, output)  # type: ignore[arg-type]
        # Written so that nothing is rounded away while s is 1.
        return output + cast((self.scale - 1) * product, output)

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        return cast(self.rotate(cast(x, self.skew)), x)

    def rotate(self, x: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        """`x R^T` for rows x; `back` gives `x R`."""
        blocks_MNbb = cast(self._orthogonal(), x)
        factors = range(len(blocks_MNbb))
        for level in factors if back else reversed(factors):
            blocks_Nbb = blocks_MNbb[level]
            x = self._factor(x, blocks_Nbb.mT if back else blocks_Nbb, level)
        return x

    def _factor(self, x: torch.Tensor, blocks_Nbb: torch.Tensor, level: int) -> torch.Tensor:
        """One factor: pairs of half blocks `2^level` half blocks apart are multiplied together."""
        lead, half, apart = x.shape[:-1], self._b // 2, 2**level
        if level:
            x = x.reshape(*lead, -1, 2, apart, half).transpose(-2, -3)
        y = torch.einsum("...nb,nbc->...nc", x.reshape(*lead, -1, self._b), blocks_Nbb)
        if level:
            y = y.reshape(*lead, -1, apart, 2, half).transpose(-2, -3)
        return y.reshape(*lead, -1)

    def _orthogonal(self) -> torch.Tensor:
        """Cayley transforms (1 - S) (1 + S)^-1 of skew-symmetric S, (M, N, b, b)."""
        b = self._b
        # Nothing is solved in 16 bits.
        entries = self.skew.to(torch.promote_types(self.skew.dtype, torch.float32))
        rows, columns = torch.triu_indices(b, b, 1, device=entries.device)
        upper = entries.new_zeros(*entries.shape[:2], b, b)
        upper[:, :, rows, columns] = entries
        skew = upper - upper.mT
        one = torch.eye(b, device=skew.device, dtype=skew.dtype)
        return cast(torch.linalg.solve(one + skew, one - skew, left=False), self.skew)

    @torch.no_grad()
    def fold(self, base: nn.Module, sign: int) -> None:
        weight = base.weight.data
        assert isinstance(weight, torch.Tensor)
        is_linear = hasattr(base, "in_features")
        # In the wider of both types: a narrow adapter must not round the weight.
        wide = torch.promote_types(weight.dtype, self.skew.dtype)
        rows_OI = (weight if is_linear else weight.T).to(wide)
        if sign > 0:
            changed_OI = self.rotate(rows_OI, back=True) * self.scale[:, None]
        else:
            changed_OI = self.rotate(rows_OI * undoing(self.scale)[:, None])
        weight.copy_(changed_OI if is_linear else changed_OI.T)
