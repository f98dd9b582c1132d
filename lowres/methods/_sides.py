"""Which linear layers the scaling methods take; the mathematics is in `_scaled_sides`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowres.core.errors import InputError, Problem

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks


def scaled(model: nn.Module, blocks: Blocks, wanted: str) -> Sequence[str]:
    """Paths of the layers of `paper` (keys, values, and what widens the feed-forward part), or of
    what `bridges.peft.linear_targets` reads."""
    from lowres.bridges import peft, sites

    if wanted != peft.PAPER_DEFAULT:
        return peft.linear_targets(model, blocks, wanted)
    found = sites.attentions(model, blocks)
    fused = next((a.query for a in found if a.fused), None)
    if fused is not None:
        raise InputError(
            "the recipe",
            [
                Problem(
                    "method.targets",
                    f"{fused} makes queries, keys and values at once, and one scale of its input "
                    "would be all three's; name the layers to scale, joined by +, or use "
                    "all-linear",
                )
            ],
        )
    narrow = [path for a in found for path in (a.key, a.value)]
    return [*narrow, *(path for f in sites.feed_forwards(model, blocks) for path in f.up)]
