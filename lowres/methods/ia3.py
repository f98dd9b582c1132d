"""Rescale keys, values and the hidden state of the feed-forward part by learned vectors.

Paper: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning,
Liu et al. 2022. https://arxiv.org/abs/2205.05638

Departs from the paper: no unlikelihood or length loss, which would be an objective; where one layer
makes queries, keys and values, queries are rescaled too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from lowres.core.method import Method, Taxonomy
from lowres.core.parts import part

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks


@part
class Ia3(Method):
    """`k = l_k * (W_k x)`, `v = l_v * (W_v x)`, `W_down (l_f * h)`, in every attention (also that
    to an encoder's output) and every feed-forward part; all l start at 1.
    """

    taxonomy: ClassVar[Taxonomy] = "additive: other"
    # 3e-3 in the paper (with Adafactor).
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-3, 1e-2)
    mergeable: ClassVar[bool] = True

    def apply(self, model: nn.Module, blocks: Blocks) -> nn.Module:
        from lowres.bridges import sites
        from lowres.bridges.peft_configs import inject_named

        down = [part.down for part in sites.feed_forwards(model, blocks)]
        there = sites.attentions(model, blocks)
        scaled = {path for one in there for path in (one.key, one.value)}
        adapted: nn.Module = inject_named(
            model, blocks, "IA3Config", [*sorted(scaled), *down], feedforward_modules=down
        )
        return adapted

    def merge(self, model: nn.Module) -> nn.Module:
        from lowres.bridges import peft

        return peft.merge(model)
