"""Where bottleneck adapters go; the mathematics is in `_bottleneck`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lowres.bridges.sites import FeedForward
    from lowres.core.delta import Piece

Activation = Literal["relu", "gelu", "swish", "tanh"]


def serial(behind: Iterable[str], reduction: int, activation: Activation) -> list[Piece]:
    """An adapter behind each of these linear layers."""
    from lowres.core.delta import Piece
    from lowres.methods._bottleneck import SerialAdapter

    settings = {"reduction": reduction, "activation": activation}
    return [Piece(SerialAdapter, list(behind), settings)]


def parallel(
    parts: Sequence[FeedForward], reduction: int, activation: Activation, scale: float,
    learned: bool,
) -> list[Piece]:  # fmt: skip
    """An adapter beside each of these feed-forward parts."""
    from lowres.core.delta import Piece, Tap
    from lowres.methods._bottleneck import ParallelAdapter

    settings = {
        "reduction": reduction, "activation": activation, "scale": scale, "learned": learned,
    }  # fmt: skip
    return [
        Piece(Tap, [one.up[0] for one in parts]),
        Piece(ParallelAdapter, [one.down for one in parts], settings),
    ]
