"""Weights of a narrow block from those of a wide one of the same class.

Kept are the features, heads and feed-forward units of largest absolute sums, the same ones in every
matrix that shares them. A matrix is written (o, i).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowres.bridges import sites
from lowres.bridges.unpacking import unpacked
from lowres.core.blocks import Blocks
from lowres.core.delta import features


def copy_into(narrow: nn.Module, wide: nn.Module, width: int) -> None:
    """Fill the parameters of the narrow block; projections whose layout is not known stay random.

    Args:
        width: Features of the narrow block's hidden states.

    Raises:
        InputError: Where the block has no attention or feed-forward part that is known.
    """
    with torch.no_grad():
        _Copy(narrow, wide).run(width)


class _Copy:
    """One block's copy while it is made."""

    def __init__(self, narrow: nn.Module, wide: nn.Module) -> None:
        self.narrow, self.wide = narrow, wide
        holder = nn.ModuleDict({"block": wide})
        only = Blocks(names=("block",), trained=frozenset({"block"}), stem=())
        self.attentions = sites.attentions(holder, only)
        (self.feed_forward,) = sites.feed_forwards(holder, only)
        self.done: set[str] = set()

    def run(self, width: int) -> None:
        ups, down = self.feed_forward.up, self.feed_forward.down
        stream = _largest(sum(self._sums(up, 0) for up in ups), width)
        units_wide, units_narrow = (features(layer)[0] for layer in self._pair(down))
        units = self._sums(down, 0)
        for up in ups:
            units = units + self._sums(up, 1).view(-1, units_wide).sum(0)
        kept = _largest(units, units_narrow)
        for up in ups:
            # One matrix may hold the gate and what it is multiplied with, one below the other.
            parts = features(self._pair(up)[0])[1] // units_wide
            self._put(up, torch.cat([kept + units_wide * i for i in range(parts)]), stream)
        self._put(down, stream, kept)
        for one in self.attentions:
            self._attention(one, stream)
        self._rest(stream)

    def _attention(self, one: Any, stream: torch.Tensor) -> None:
        inner_wide, inner_narrow = (features(layer)[0] for layer in self._pair(one.out))
        heads = _heads(self._pair(one.inner)[0], inner_wide)
        size = inner_wide // heads
        sums = self._sums(one.out, 0).view(heads, size).sum(1)
        chosen = _largest(sums, -(-inner_narrow // size))
        rows = _rows(chosen, size)[:inner_narrow]
        if not one.fused:
            made_wide, made_narrow = (features(layer)[1] for layer in self._pair(one.key))
            groups = rows
            if made_wide != inner_wide:
                # Several queries' heads share one of keys: that of the first of each set is taken.
                sets = max(1, inner_narrow // made_narrow)
                shared = chosen[::sets] // (inner_wide // made_wide)
                groups = _rows(shared, size)[:made_narrow]
            self._put(one.query, rows, stream)
            self._put(one.key, groups, stream)
            self._put(one.value, groups, stream)
        elif isinstance(self._pair(one.query)[1], Conv1D):  # GPT-2: queries, then keys, then values
            self._put(one.query, torch.cat([rows + inner_wide * i for i in range(3)]), stream)
        else:
            self.done |= {self._inside(one.query) + end for end in (".weight", ".bias")}
        self._put(one.out, stream, rows)
        table = f"{self._inside(one.inner)}.relative_attention_bias"
        names = dict(self.narrow.named_modules())
        if table in names:
            target: Any = names[table]
            self.done.add(f"{table}.weight")
            source: Any = getattr(self._pair(one.inner)[0], "relative_attention_bias", None)
            if source is None:  # it lies in a block below that stays frozen
                target.weight.zero_()
            else:
                target.weight.copy_(source.weight.index_select(1, chosen[: target.weight.shape[1]]))

    def _rest(self, stream: torch.Tensor) -> None:
        """Norms, and what is there as large."""
        own = dict(self.wide.named_parameters())
        for name, parameter in self.narrow.named_parameters():
            source = own.get(name)
            if name in self.done or source is None:
                continue
            if source.shape == parameter.shape:
                parameter.copy_(source)
            elif parameter.shape == stream.shape:
                parameter.copy_(source.index_select(0, stream))

    def _inside(self, path: str) -> str:
        return path.removeprefix("block.")

    def _pair(self, path: str) -> tuple[Any, Any]:
        inside = self._inside(path)
        return self.wide.get_submodule(inside), self.narrow.get_submodule(inside)

    def _sums(self, path: str, dim: int) -> torch.Tensor:
        weight_oi = dense(self._pair(path)[0])
        wide = torch.promote_types(weight_oi.dtype, torch.float32)
        return torch.linalg.vector_norm(weight_oi, ord=1, dim=dim, dtype=wide)

    def _put(self, path: str, rows: torch.Tensor, columns: torch.Tensor) -> None:
        source, target = self._pair(path)
        weight_oi = dense(source).index_select(0, rows).index_select(1, columns)
        target.weight.copy_(weight_oi.T if isinstance(target, Conv1D) else weight_oi)
        if getattr(target, "bias", None) is not None:
            target.bias.copy_(source.bias.index_select(0, rows))
        self.done |= {f"{self._inside(path)}.{own}" for own in ("weight", "bias")}


def dense(layer: Any) -> torch.Tensor:
    """The weight (o, i) of a linear layer of any make, unpacked where it is held in few bits."""
    weight = unpacked(layer)
    return weight if hasattr(layer, "in_features") else weight.T


def _heads(attention: Any, inner: int) -> int:
    """How many heads the module that calls the kernel has."""
    for name in ("num_heads", "num_attention_heads", "n_heads", "n_head"):
        if isinstance(getattr(attention, name, None), int):
            return int(getattr(attention, name))
    size = getattr(attention, "head_dim", None)
    return inner // size if size else int(attention.config.num_attention_heads)


def _rows(heads: torch.Tensor, size: int) -> torch.Tensor:
    """Rows of these heads, one head after the other."""
    return (heads[:, None] * size + torch.arange(size, device=heads.device)).flatten()


def _largest(sums: Any, count: int) -> torch.Tensor:
    """Places of the largest, in their order."""
    return sums.topk(count).indices.sort().values
