"""Which parameters weight decay is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def decays(parameter: nn.Parameter) -> bool:
    """Matrices do; biases and scales do not, those neither that are held as one row or column:
    scales of (IA)^3 have 1, and not 0, as the value that changes nothing."""
    return sum(size > 1 for size in parameter.shape) > 1
