"""Where bottleneck adapters go; the mathematics is in `_bottleneck`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from lowres.core.errors import InputError, Problem

if TYPE_CHECKING:
    from torch import nn

    from lowres.bridges.sites import FeedForward
    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece

SHARED = "all blocks share a factor, which the first of them holds"

Activation = Literal["relu", "gelu", "swish", "tanh"]


def behind_both(model: nn.Module, blocks: Blocks) -> list[str]:
    """The last layers of attention (to itself) and of the feed-forward part."""
    from lowres.bridges import sites

    own = [one.out for one in sites.attentions(model, blocks) if not one.cross]
    return own + behind_feed_forward(model, blocks)


def behind_feed_forward(model: nn.Module, blocks: Blocks) -> list[str]:
    """The last layer of each feed-forward part."""
    from lowres.bridges import sites

    return [one.down for one in sites.feed_forwards(model, blocks)]


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


def hypercomplex(
    model: nn.Module, behind: Sequence[str], reduction: int, activation: Activation, terms: int,
    rank: int,
) -> list[Piece]:  # fmt: skip
    """An adapter of Kronecker products behind each of these linear layers, one rule for all.

    Raises:
        InputError: When `terms` does not divide a width.
    """
    from lowres.core.delta import Piece, features
    from lowres.methods._kronecker import HypercomplexAdapter

    for path in behind:
        width = features(model.get_submodule(path))[1]
        if width % terms:
            nearest = max(n for n in range(1, terms) if width % n == 0)
            text = f"{terms} does not divide the {width} features of '{path}', which are cut into "
            raise InputError(
                "the recipe", [Problem("method.terms", f"{text}so many parts; use {nearest}")]
            )
    settings = {"reduction": reduction, "activation": activation, "terms": terms, "rank": rank}
    return [Piece(HypercomplexAdapter, behind, settings)]


def masked(
    behind: Sequence[str], reduction: int, activation: Activation, sparsity: float, score: str
) -> list[Piece]:
    """An adapter with missing weights behind each of these linear layers."""
    from lowres.core.delta import Piece
    from lowres.methods._masked import MaskedAdapter

    settings = {
        "reduction": reduction, "activation": activation, "sparsity": sparsity, "score": score,
    }  # fmt: skip
    return [Piece(MaskedAdapter, behind, settings)]


def kronecker_beside(parts: Sequence[FeedForward], scale: float, residual: bool) -> list[Piece]:
    """A Kronecker product beside each of these feed-forward parts."""
    from lowres.core.delta import Piece, Tap
    from lowres.methods._kronecker import KroneckerBeside

    settings = {"scale": scale, "residual": residual}
    return [
        Piece(Tap, [one.up[0] for one in parts]),
        Piece(KroneckerBeside, [one.down for one in parts], settings),
    ]
