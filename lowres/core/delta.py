"""What a method adds to one module: the part of an adapter that is mathematics.

A method that PEFT lacks writes a Delta; `bridges.peft` makes it a PEFT tuner (saving, several
adapters, disabling, merging).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping


class Delta(nn.Module):
    """Trained parameters beside one frozen module, and how its output changes by them."""

    def __init__(self, base: nn.Module, settings: Mapping[str, Any]) -> None:
        """Make the parameters for a module; at their initial values the output must not change."""
        super().__init__()

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """The module's new output from its own output and inputs."""
        raise NotImplementedError

    def fold(self, base: nn.Module, sign: int) -> None:
        """Add (`sign` 1) or take away (-1) what was learned to the module's weights.

        Raises:
            NotImplementedError: When the mathematics allows no merge.
        """
        raise NotImplementedError
