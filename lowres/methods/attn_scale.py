"""Rescale queries, keys, values and the attention logits by learned factors, which start at 1.

Paper: Strong Baselines for Parameter Efficient Few-Shot Fine-tuning, Basu et al. 2023.
https://arxiv.org/abs/2304.01917

Departs from the paper: the forms that fold into weights. A matrix is scaled by its rows, one factor
for each output feature, and the attention map by one factor for each head on its logits, which is
one on the head's queries (a position bias added to the logits, as T5's, is not scaled). The offsets
of the domain-residual adapter are added to what attention and feed-forward part give, before a norm
that follows them. Text models as well as vision transformers; a linear head.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from lowres.core.errors import InputError, Problem
from lowres.core.method import Taxonomy
from lowres.core.parts import part
from lowres.methods._adapter import Adapter

if TYPE_CHECKING:
    from torch import nn

    from lowres.bridges.sites import Attention
    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece

Scaled = Literal["query", "key", "value", "map"]

_MATRICES = ("query", "key", "value")
_QUERIES_FIRST = ("c_attn", "qkv_proj", "Wqkv")
"""Fused projections whose first rows are all heads' queries."""
_NORM_OF_QUERIES = re.compile(r"(q|qk|query)_?(layer_?)?norm")


@part
class AttnScale(Adapter):
    """`y = diag(1 + s) W x`, in every attention of a block. Backward keeps the scaled outputs.

    Args:
        scales: What is scaled: `query`, `key` and `value` by a factor for each output feature,
            `map` by one for each head.
        offsets: Whether a vector is added behind attention and behind the feed-forward part of each
            block (the paper's domain-residual adapter). It merges into a bias, so not into models
            that have none there (Llama, T5).
    """

    taxonomy: ClassVar[Taxonomy] = "selective"
    # The paper searches a rate for each data set; factors near 1 want larger steps than matrices.
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-3, 1e-2)
    mergeable: ClassVar[bool] = True

    scales: tuple[Scaled, ...] = ("query", "key", "value", "map")
    offsets: bool = False

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.bridges import sites
        from lowres.core.delta import Piece
        from lowres.methods._scale import Offset, Scale

        if not self.scales and not self.offsets:
            raise _refused("nothing is scaled and nothing added; name a scale")
        there = sites.attentions(model, blocks)
        # One piece for each way to scale; the models' attentions are mostly alike.
        grouped: dict[tuple[bool, int, int], list[str]] = {}
        for one in there:
            for path, way in self._ways(model, one):
                grouped.setdefault(way, []).append(path)
        found = [
            Piece(Scale, paths, {"rows": rows, "heads": heads, "head_rows": head_rows})
            for (rows, heads, head_rows), paths in grouped.items()
        ]
        if self.offsets:
            behind = [one.out for one in there if not one.cross]
            behind += [one.down for one in sites.feed_forwards(model, blocks)]
            found.append(Piece(Offset, behind))
        return found

    def _ways(
        self, model: nn.Module, attention: Attention
    ) -> Sequence[tuple[str, tuple[bool, int, int]]]:
        """Layers of an attention to scale, each with `rows`, `heads` and `head_rows`."""
        rows = [name for name in _MATRICES if name in self.scales]
        by_head = _heads(model, attention) if "map" in self.scales else (0, 0)
        if attention.fused:
            if rows and len(rows) < len(_MATRICES):
                raise _refused(
                    f"'{attention.query}' holds queries, keys and values in one matrix; scale all "
                    "three, or none of them",
                )
            return [(attention.query, (bool(rows), *by_head))] if self.scales else []
        ways = [(getattr(attention, name), (True, 0, 0)) for name in rows if name != "query"]
        if "query" in rows or by_head[0]:
            ways.append((attention.query, ("query" in rows, *by_head)))
        return ways


def _heads(model: nn.Module, attention: Attention) -> tuple[int, int]:
    """Heads of an attention and features of a head.

    Raises:
        InputError: Where a head's queries cannot be scaled on their own.
    """
    from lowres.core.delta import features

    inner, config = model.get_submodule(attention.inner), getattr(model, "config", None)
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head")
    counts = [getattr(inner, n, None) for n in names] + [
        getattr(config, "num_attention_heads", None)
    ]
    heads = next((count for count in counts if isinstance(count, int) and count > 0), 0)
    made = features(model.get_submodule(attention.query))[1]
    if attention.fused:
        # GPTBigCode with keys of its own for each head lays queries, keys and values out by head.
        by_head = getattr(inner, "multi_query", None) is False
        if by_head or attention.query.rpartition(".")[2] not in _QUERIES_FIRST:
            raise _no_map(f"which rows of '{attention.query}' are queries is not known")
        made = features(model.get_submodule(attention.out))[0]
    if not heads or made % heads:
        raise _no_map(f"how many heads '{attention.inner}' has is not known")
    if hasattr(inner, "pos_query_proj"):  # DeBERTa
        raise _no_map("the queries of relative positions have a layer of their own")
    if any(_NORM_OF_QUERIES.fullmatch(name) for name, _ in inner.named_children()):
        raise _no_map("queries are normalised, which takes a head's factor away again")
    return heads, made // heads


def _no_map(why: str) -> InputError:
    return _refused(f"'map': {why}; leave it out: [query, key, value]")


def _refused(why: str) -> InputError:
    return InputError("the recipe", [Problem("method.scales", why)])
