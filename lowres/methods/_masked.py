"""Bottleneck adapters most of whose weights do not exist.

Legend as in `_bottleneck`; O, I rows and columns of one of the two matrices, K weights of it kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowres.core.delta import Delta, cast, features, place
from lowres.core.recompute import recompute
from lowres.methods._bottleneck import ACTIVATIONS


def _dense(values_K: torch.Tensor, places_K: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    weight = values_K.new_zeros(rows * columns)
    return weight.index_put((places_K.long(),), values_K).view(rows, columns)


class _Product(torch.autograd.Function):
    """`W x` of which backward keeps x and the weights that there are, and never W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        values_K: torch.Tensor,
        places_K: torch.Tensor,
        shape_OI: tuple[int, int],
    ) -> torch.Tensor:
        ctx.save_for_backward(x, values_K, places_K)
        ctx.shape = shape_OI
        return F.linear(x, _dense(values_K, places_K, *shape_OI))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, values_K, places_K = ctx.saved_tensors
        of_x = of_values = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ _dense(values_K, places_K, *ctx.shape)
        if ctx.needs_input_grad[1]:
            of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
            of_values = of_weight.flatten().index_select(0, places_K)
        return of_x, of_values, None, None


class MaskedLinear(nn.Module):
    """`W x + b` with W (O, I) of which K are kept: their values and their places, row by row.

    Args:
        kept: Share of W that exists.
        score: `magnitude` keeps what a Kaiming-uniform draw made largest, `random` any.
        still: Whether the kept values start at zero, and not as they were drawn.
    """

    def __init__(
        self, given: int, made: int, kept: float, score: str, still: bool, device: torch.device
    ) -> None:
        super().__init__()
        self._shape = (made, given)
        drawn = torch.empty(made, given, device=device)
        if device.type != "meta":
            nn.init.kaiming_uniform_(drawn, a=5**0.5)
        by = drawn.abs() if score == "magnitude" else torch.rand_like(drawn)
        count = max(1, round(kept * drawn.numel()))
        places = by.flatten().topk(count).indices.sort().values
        values = drawn.flatten()[places]
        self.values_K = nn.Parameter(torch.zeros_like(values) if still else values)
        self.bias = nn.Parameter(torch.zeros(made, device=device))
        self.places_K: torch.Tensor
        self.register_buffer("places_K", places.int())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self.values_K
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            # What autocast does to a product it does not do to one of our own.
            x, values = (t.to(torch.get_autocast_dtype(kind)) for t in (x, values))
        product: torch.Tensor = _Product.apply(x, values, self.places_K, self._shape)  # type: ignore[no-untyped-call]
        return product + cast(self.bias, product)

    def dense(self) -> torch.Tensor:
        """W, zeros included."""
        return _dense(self.values_K, self.places_K, *self._shape)


class MaskedAdapter(Delta):
    """`y + W_up act(W_down y + b_down) + b_up` behind a layer whose output is y.

    Settings: `reduction` (D / M), `activation`, `sparsity` (share of each matrix that is missing),
    `score`.
    """

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        width, device = features(base)[1], place(base)
        middle = max(1, width // int(settings["reduction"]))
        kept, score = 1 - float(settings["sparsity"]), str(settings["score"])
        self.down = MaskedLinear(width, middle, kept, score, False, device)
        self.up = MaskedLinear(middle, width, kept, score, True, device)
        self._activation = ACTIVATIONS[settings["activation"]]

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output + cast(recompute(self._added, output, parameters=self.parameters()), output)

    def _added(self, y: torch.Tensor) -> torch.Tensor:
        up: torch.Tensor = self.up(self._activation(self.down(cast(y, self.down.values_K))))
        return up
