"""A trained change of single weights: y = W x + S x. Legend: n entries of S (o, i), N positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lowres.core.delta import Delta, features, place

PARTS = 8
"""S is written out in so many parts, by rows: none of weight size is ever there, and the products
are those of dense matrices, whose sums have one order on every device."""
_LEAST = 1 << 16
"""Numbers below which a matrix is written at once."""
_BEFORE = 8
"""Numbers before a part, which let it begin where matrix units want it; the last of them and one
behind the part take what lies outside."""
PLACES = torch.int32


class _AddSparse(torch.autograd.Function):
    """`output + S x`. Backward: dx = S^T dy; dS_k = sum over N of dy[., row_k] x[., column_k]."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        inputs: torch.Tensor,
        values_n: torch.Tensor,
        entries_n: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, values_n, entries_n)
        x_Ni = inputs.reshape(-1, inputs.shape[-1]).to(output.dtype)
        y_No = output.reshape(-1, output.shape[-1])
        # Not a view of what is filled: a model may add to it in place (Falcon).
        made = output.new_empty(output.shape)
        made_No = made.view(y_No.shape)
        parts = _Parts(entries_n, y_No.shape[1], x_Ni)
        values_n = values_n.to(output.dtype)
        with torch.autocast(output.device.type, enabled=False):
            for rows, at_n in parts:
                part_oi = parts.written(rows, at_n, values_n)
                made_No[:, rows] = torch.addmm(y_No[:, rows], x_Ni, part_oi.t())
        return made

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, values_n, entries_n = ctx.saved_tensors
        x_Ni = inputs.reshape(-1, inputs.shape[-1]).to(gradient.dtype)
        dy_No = gradient.reshape(-1, gradient.shape[-1])
        dx_Ni = torch.zeros_like(x_Ni) if ctx.needs_input_grad[1] else None
        dvalues_n = torch.zeros_like(values_n) if ctx.needs_input_grad[2] else None
        parts = _Parts(entries_n, dy_No.shape[1], x_Ni)
        products = _Parts(entries_n, dy_No.shape[1], x_Ni)
        values_n = values_n.to(gradient.dtype)
        with torch.autocast(gradient.device.type, enabled=False):
            for rows, at_n in parts:
                if dvalues_n is not None:
                    torch.mm(dy_No[:, rows].t(), x_Ni, out=products.matrix(rows))
                    products.flat[products.end(rows)] = 0  # as what lies before: no gradient
                    dvalues_n += products.flat[at_n]
                if dx_Ni is not None:
                    dx_Ni.addmm_(dy_No[:, rows], parts.written(rows, at_n, values_n))
        dx = None if dx_Ni is None else dx_Ni.view(inputs.shape).to(inputs.dtype)
        return gradient, dx, dvalues_n, None


class _Parts:
    """The parts of S (o, i), one after the other in the same memory."""

    def __init__(self, entries_n: torch.Tensor, o: int, x_Ni: torch.Tensor) -> None:
        self.o, self.i = o, int(x_Ni.shape[1])
        self._entries_n = entries_n.long()
        self._step: int = o if o * self.i <= _LEAST else -(-o // PARTS)
        self.flat = x_Ni.new_zeros(_BEFORE + self._step * self.i + 1)

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows, and the place of each entry in `flat`."""
        for start in range(0, self.o, self._step):
            rows = slice(start, min(start + self._step, self.o))
            at_n = self._entries_n + (_BEFORE - start * self.i)
            yield rows, at_n.clamp_(_BEFORE - 1, self.end(rows))

    def matrix(self, rows: slice) -> torch.Tensor:
        """A part's memory."""
        return self.flat[_BEFORE : self.end(rows)].view(-1, self.i)

    def written(self, rows: slice, at_n: torch.Tensor, values_n: torch.Tensor) -> torch.Tensor:
        """The rows of S."""
        self.flat.zero_()
        self.flat[at_n] = values_n
        return self.matrix(rows)

    def end(self, rows: slice) -> int:
        """The place behind a part."""
        return _BEFORE + int(rows.stop - rows.start) * self.i


def spread(count: int, base: nn.Module) -> torch.Tensor:
    """Places of `count` entries, evenly over a layer's matrix."""
    o, i = features(base)[::-1]
    assert o * i < 2**31, "places are held in 32 bits"
    places = torch.arange(count, device=place(base)) * (o * i) // count
    return places.to(PLACES)


class SparseDelta(Delta):
    """`y + S x` where S has n entries from zero, at places that a choice says.

    The layer's input is kept for backward. The values are rounded to the type of the output where
    they are multiplied, as the weights are that they change.

    Settings: `n`.
    """

    entries: torch.Tensor

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        count = int(settings["n"])
        self.values = nn.Parameter(torch.zeros(count, device=place(base)))
        self.register_buffer("entries", self.chosen(base, count))

    def chosen(self, base: nn.Module, count: int) -> torch.Tensor:
        """The places before another choice is put there or loaded."""
        return spread(count, base)

    def effective(self) -> torch.Tensor:
        """The values as the output has them."""
        return self.values

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        add: Any = _AddSparse.apply
        made: torch.Tensor = add(output, inputs[0], self.effective(), self.entries)
        return made

    def fold(self, base: Any, sign: int) -> None:
        weight: Any = base.weight.data if hasattr(base, "in_features") else base.weight.data.t()
        i = features(base)[0]
        entries = self.entries.long().to(weight.device)
        at = entries // i, entries % i
        wide = torch.promote_types(weight.dtype, self.values.dtype)
        values = self.effective().detach().to(weight.device, wide)
        weight[at] = weight[at].to(wide).add(values, alpha=sign).to(weight.dtype)
