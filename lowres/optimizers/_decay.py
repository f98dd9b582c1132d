"""Which parameters weight decay is for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def decays(parameter: nn.Parameter) -> bool:
    """Matrices do; biases and scales do not, those neither that are held as one row or column:
    scales of (IA)^3 have 1, and not 0, as the value that changes nothing. Single entries of a
    matrix that a method keeps as a list do not."""
    return sum(size > 1 for size in parameter.shape) > 1


def groups(
    parameters: Sequence[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups of an optimizer of torch: those that decay, and the others with a decay of 0."""
    decayed = [p for _, p in parameters if decays(p)]
    plain = [p for _, p in parameters if not decays(p)]
    return [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, weight_decay), (plain, 0.0))
        if group
    ]
