"""Adapters, low-rank products, prefixes and biases, other ones in each of four groups of blocks.

Paper: Parameter-Efficient Fine-Tuning Design Spaces, Chen et al. 2023.
https://arxiv.org/abs/2301.01821

Departs from the paper: what a block may train is shared evenly among its parts; an encoder and a
decoder are split into groups each by itself; biases are trained where the model has some.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from lowres.core.errors import InputError, Problem
from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveFloat, part
from lowres.methods._adapter import Adapter
from lowres.methods._adapters import Activation

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece

GROUPS = (
    ("adapter", "low rank"),
    ("adapter", "prefix"),
    ("adapter", "prefix", "bias"),
    ("prefix", "bias", "low rank"),
)
"""Of the model that the paper's search ends with, from the input to the output."""


@part
class S4(Adapter):
    """Groups are a spindle: a sixth of the blocks of a stack, a third, a third, a sixth; a short
    stack has not all of them. But for rounding, blocks train equally many parameters: a bottleneck
    behind the feed-forward part (`y + W_up act(W_down y + b) + c`), products beside queries and
    values (`s B A x`), keys and values before those of the attentions, all biases.

    A prefix always takes a share of the attention, so the outputs are not the checkpoint's before
    the first update.

    Args:
        share: Trained parameters, of those of the model; rounded down for each part, at least one
            unit of each.
        scale: s.
        activation: relu, gelu, swish or tanh.
    """

    taxonomy: ClassVar[Taxonomy] = "hybrid"
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-5, 1e-3)
    starts_as_base: ClassVar[bool] = False

    share: Annotated[float, Field(gt=0, le=0.5)] = 0.005
    scale: PositiveFloat = 1.0
    activation: Activation = "swish"

    def uneven(self) -> str | None:
        return "each group of blocks trains other parts"

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.bridges import attention, bitsandbytes

        attention.stop_unless_served(model)
        everything = sum(bitsandbytes.element_count(p) for p in model.parameters())
        budget = int(self.share * everything / len(blocks.names))
        alike: dict[tuple[str, int], list[str]] = {}
        for name in blocks.names:
            stack = name.rpartition(".")[0]
            inside = [n for n in blocks.names if n.rpartition(".")[0] == stack]
            if name in blocks.trained:
                group = _group(inside.index(name), len(inside))
                alike.setdefault((stack, group), []).append(name)
        if not alike:
            text = "the freezing leaves no block trained; train some, or use method 'full'"
            raise InputError("the recipe", [Problem("method", text)])
        return [
            piece
            for (stack, group), names in alike.items()
            for piece in self._pieces(model, blocks, stack, names, GROUPS[group], budget)
        ]

    def _pieces(
        self,
        model: Any,
        blocks: Blocks,
        stack: str,
        names: list[str],
        parts: Sequence[str],
        budget: int,
    ) -> list[Piece]:
        """What goes to blocks of one stack and group, which are built alike."""
        from lowres.bridges import attention, sites
        from lowres.core.delta import Piece, features
        from lowres.methods._bias import BiasDelta
        from lowres.methods._bottleneck import SerialAdapter
        from lowres.methods._low_rank import LowRank
        from lowres.methods._prefix import KeyValuePrefix

        only = blocks.only(names, train_stem=False)
        there, out = sites.attentions(model, only), []
        mine = [a for a in there if a.block == names[0]]
        if "bias" in parts:
            biased = [p for name in names for p in _biased(model, name)]
            inside = [p for p in biased if p.startswith(f"{names[0]}.")]
            budget -= sum(model.get_submodule(p).bias.numel() for p in inside)
            out += [Piece(BiasDelta, biased)] if biased else []
        budget //= sum(p != "bias" for p in parts)
        if "adapter" in parts:
            behind = [f.down for f in sites.feed_forwards(model, only)]
            width = features(model.get_submodule(behind[0]))[1]
            units = max(1, (budget - width) // (2 * width + 1))
            settings: dict[str, Any] = {"units": units, "activation": self.activation}
            out.append(Piece(SerialAdapter, behind, settings))
        if "low rank" in parts:
            products = list(dict.fromkeys(n for a in there for n in (a.query, a.value)))
            inside = [n for n in products if n.startswith(f"{names[0]}.")]
            cost = sum(sum(features(model.get_submodule(n))) for n in inside)
            rank = max(1, budget // cost)
            settings = {"rank": rank, "alpha": self.scale * rank}
            out.append(Piece(LowRank, products, settings))
        if "prefix" in parts:
            heads, width = attention.heads_of(model, mine[0])
            length = max(1, budget // (2 * heads * width * len(mine)))
            settings = {
                "length": length, "mlp": None, "group": stack, "heads": heads, "width": width,
            }  # fmt: skip
            out.append(Piece(KeyValuePrefix, [a.key for a in there], settings))
        return out


def _group(place: int, count: int) -> int:
    """Which group the middle of a block lies in: they end at 1, 3 and 5 sixths of the stack."""
    return sum(6 * (2 * place + 1) >= 2 * count * end for end in (1, 3, 5))


def _biased(model: Any, block: str) -> list[str]:
    """Paths of the modules of a block that have a bias."""
    return [
        f"{block}.{path}"
        for path, module in model.get_submodule(block).named_modules()
        if "bias" in dict(module.named_parameters(recurse=False)) and not any(module.children())
    ]
