"""A trained change of single weights: y = W x + S x. Legend: n entries of S (o, i), N positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lowres.core.delta import Delta, features, place

PARTS = 16
"""S is written out in so many parts, by rows: none of weight size is ever there, and the products
are those of dense matrices, whose sums have one order on every device."""
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
        made_No = torch.empty_like(y_No)
        with torch.autocast(output.device.type, enabled=False):
            for rows, at_n in _parts(entries_n, y_No.shape[1], x_Ni.shape[1]):
                part_oi = _written(values_n, at_n, rows, x_Ni)
                made_No[:, rows] = torch.addmm(y_No[:, rows], x_Ni, part_oi.t())
        return made_No.view(output.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, values_n, entries_n = ctx.saved_tensors
        x_Ni = inputs.reshape(-1, inputs.shape[-1]).to(gradient.dtype)
        dy_No = gradient.reshape(-1, gradient.shape[-1])
        dx_Ni = torch.zeros_like(x_Ni) if ctx.needs_input_grad[1] else None
        dvalues_n = torch.zeros_like(values_n) if ctx.needs_input_grad[2] else None
        with torch.autocast(gradient.device.type, enabled=False):
            for rows, at_n in _parts(entries_n, dy_No.shape[1], x_Ni.shape[1]):
                if dvalues_n is not None:
                    part_oi = dy_No[:, rows].t() @ x_Ni
                    last = part_oi.numel() - 1
                    found_n = part_oi.flatten()[at_n.clamp(max=last)].to(dvalues_n.dtype)
                    dvalues_n += found_n.masked_fill_(at_n > last, 0)
                    del part_oi, found_n
                if dx_Ni is not None:
                    dx_Ni.addmm_(dy_No[:, rows], _written(values_n, at_n, rows, x_Ni))
        dx = None if dx_Ni is None else dx_Ni.view(inputs.shape).to(inputs.dtype)
        return gradient, dx, dvalues_n, None


def _parts(entries_n: torch.Tensor, o: int, i: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of S, and where each entry lies among them; behind the last place where it does not."""
    step = -(-o // PARTS)
    for start in range(0, o, step):
        rows = slice(start, min(start + step, o))
        size = (rows.stop - start) * i
        at_n = entries_n.long() - start * i
        yield rows, at_n.masked_fill_((at_n < 0) | (at_n >= size), size)


def _written(
    values_n: torch.Tensor, at_n: torch.Tensor, rows: slice, x_Ni: torch.Tensor
) -> torch.Tensor:
    """Some rows of S as a matrix."""
    o, i = rows.stop - rows.start, x_Ni.shape[1]
    flat = x_Ni.new_zeros(o * i + 1)
    flat[at_n] = values_n.to(flat.dtype)
    return flat[:-1].view(o, i)


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
