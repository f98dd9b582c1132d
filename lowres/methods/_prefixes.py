"""Where prefixes go; the mathematics is in `_prefix`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from lowres.core.parts import PositiveInt, part
from lowres.methods._adapter import Adapter

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Delta, Piece


@part
class Prefixed(Adapter):
    """What methods with prefixes have in common.

    Args:
        length: Trained keys for each attention.
        mlp: Inner width of the network that makes them; null for plain tables.
    """

    starts_as_base: ClassVar[bool] = False

    length: PositiveInt
    mlp: PositiveInt | None

    def uneven(self) -> str | None:
        return None if self.mlp is None else "blocks share what their prefixes are made of"


def prefixes(
    model: nn.Module,
    blocks: Blocks,
    length: int,
    mlp: int | None,
    kind: type[Delta] | None = None,
) -> list[Piece]:
    """Keys and values for every attention of the trained blocks, by groups: of each stack its own
    attentions and those that look at the encoder.

    Args:
        kind: A delta that sits at the queries; at the keys where None.
    """
    from lowres.bridges import attention, sites
    from lowres.core.delta import Piece
    from lowres.methods._prefix import KeyValuePrefix

    attention.stop_unless_served(model)
    groups: dict[tuple[str, int, int], list[str]] = {}
    for one in sites.attentions(model, blocks):
        group = one.block.rpartition(".")[0] + (" cross" if one.cross else "")
        place = groups.setdefault((group, *attention.heads_of(model, one)), [])
        place.append(one.query if kind else one.key)
    return [
        Piece(
            kind or KeyValuePrefix,
            targets,
            {"length": length, "mlp": mlp, "group": group, "heads": heads, "width": width},
        )
        for (group, heads, width), targets in groups.items()
    ]
