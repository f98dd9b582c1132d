"""A trained row for each token of the vocabulary, added to what enters a block. Legend: V tokens of
the vocabulary, D hidden, E width of embeddings, R rank, a and b with a b >= V, N tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowres.core.delta import Delta, cast, nearest, place
from lowres.core.errors import LowresError
from lowres.core.recompute import WideningLinear

_AT_ONCE = 4096
"""Rows of a table that are computed together."""


class TokenIds(Delta):
    """Keeps the last token ids, and their embeddings where asked to, for the blocks above; the
    highest of them lets them go, or they would take memory until the next pass.

    Settings: `embeddings`: whether they are wanted.
    """

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        self._wanted = bool(settings["embeddings"])
        self.ids: torch.Tensor | None = None
        self.embedded: torch.Tensor | None = None
        self.highest: TokenRows | None = None

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        self.ids, self.embedded = inputs[0], output if self._wanted else None
        return output


class TokenRows(Delta):
    """Calls a block with `H + P[x]`, x the ids that came in last.

    Settings: `vocabulary` (V), `hidden` (D), and what the rows are made of.
    """

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        tap = nearest(before, TokenIds)
        assert isinstance(tap, TokenIds), "what keeps the ids goes to the embedding below"
        self.tap: TokenIds
        self.borrow("tap", tap)
        tap.borrow("highest", self)  # until one that is made later takes its place
        self._sizes = (int(settings["vocabulary"]), int(settings["hidden"]))
        if settings.get("fused"):
            self.table: nn.Parameter | None = nn.Parameter(
                torch.zeros(self._sizes, device=place(base))
            )
        else:
            self.table = None
            self.make(settings, place(base))

    def make(self, settings: Mapping[str, Any], device: torch.device) -> None:
        """Make the factors; the last one is zero."""
        raise NotImplementedError

    def rows(self, ids: torch.Tensor, embedded: torch.Tensor | None) -> torch.Tensor:
        """P[x] of ids and, where kept, their embeddings, (..., D)."""
        raise NotImplementedError

    def around(
        self, call: Callable[..., torch.Tensor], *inputs: torch.Tensor, **others: Any
    ) -> torch.Tensor:
        ids = self.tap.ids
        hidden = inputs[0] if inputs else others.pop("hidden_states")
        if ids is None or ids.shape != hidden.shape[:-1]:
            raise LowresError("rows are picked by token ids; the model was called with embeddings")
        rows = (
            self.rows(ids, self.tap.embedded)
            if self.table is None
            else F.embedding(ids, self.table)
        )
        if self.tap.highest is self:
            self.tap.ids = self.tap.embedded = None
        return call(hidden + cast(rows, hidden), *inputs[1:], **others)

    @torch.no_grad()
    def fuse(self, embedding: nn.Module) -> None:
        """Put the table (V, D) in the place of the factors.

        Args:
            embedding: What the ids go through, as it was in training.
        """
        ids = torch.arange(self._sizes[0], device=place(embedding))
        table = torch.cat([self.rows(some, embedding(some)) for some in torch.split(ids, _AT_ONCE)])
        for name in [*self._modules, *(n for n in self._parameters if n != "table")]:
            delattr(self, name)
        del self.table
        self.table = nn.Parameter(table, requires_grad=False)


class KroneckerRows(TokenRows):
    """`P = (W_L kron W_M) W_R`, W_L (a, R), W_M (b, R), W_R (R R, D) zero; only rows of tokens that
    are there are computed.

    Settings: `rank` (R).
    """

    def make(self, settings: Mapping[str, Any], device: torch.device) -> None:
        vocabulary, hidden = self._sizes
        rank = int(settings["rank"])
        self._inner = int(vocabulary**0.5 + 1)
        outer = -(-vocabulary // self._inner)
        self.left = nn.Parameter(torch.randn(outer, rank, device=device) * rank**-0.5)
        self.middle = nn.Parameter(torch.randn(self._inner, rank, device=device) * rank**-0.5)
        self.right = nn.Parameter(torch.zeros(rank * rank, hidden, device=device))

    def rows(self, ids: torch.Tensor, embedded: torch.Tensor | None) -> torch.Tensor:
        left_NR = F.embedding(ids // self._inner, self.left)
        middle_NR = F.embedding(ids % self._inner, self.middle)
        both = (left_NR[..., :, None] * middle_NR[..., None, :]).flatten(-2)
        return both @ self.right


class EmbeddedRows(TokenRows):
    """`P = gelu(E W_1 + b_1) W_2 + b_2`, E (V, E) the frozen embeddings, W_1 (E, R), W_2 (R, D) and
    b_2 zero.

    Settings: `rank` (R), `embedded` (E).
    """

    def make(self, settings: Mapping[str, Any], device: torch.device) -> None:
        rank = int(settings["rank"])
        self.inner = WideningLinear(int(settings["embedded"]), rank, device=device)
        self.outer = nn.Linear(rank, self._sizes[1], device=device)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def rows(self, ids: torch.Tensor, embedded: torch.Tensor | None) -> torch.Tensor:
        assert embedded is not None, "the embedding below keeps what it gives"
        out: torch.Tensor = self.outer(F.gelu(self.inner(embedded)))
        return out


def fuse(model: Any) -> None:
    """Put tables (V, D) in the place of all factors: the same outputs by one gather in each block,
    for V D numbers a block.

    Args:
        model: A PeftModel; what is saved of it holds the tables.
    """
    from lowres.bridges.peft_tuner import DeltaLayer

    layers = [module for module in model.modules() if isinstance(module, DeltaLayer)]
    for name, config in model.peft_config.items():
        deltas = [(layer, delta) for layer in layers for delta in layer.deltas(name)]
        embeddings = {id(d): layer.get_base_layer() for layer, d in deltas}
        for _, delta in deltas:
            if isinstance(delta, TokenRows) and delta.table is None:
                delta.fuse(embeddings[id(delta.tap)])
        for part in config.parts:
            if "vocabulary" in part["settings"]:
                part["settings"]["fused"] = True
