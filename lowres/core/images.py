"""What stands in the place of text and of its tokenizer where a model reads images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

Shape = tuple[int, int, int]
"""Channels, height and width (C, H, W)."""


@dataclass(frozen=True, slots=True)
class Image:
    """One image, 0 black to 255 white in each channel.

    Args:
        pixels: C x H x W bytes, the last dimension moving fastest.
    """

    pixels: bytes
    shape: Shape


@dataclass(frozen=True)
class ImageReader:
    """What an image must be for a model, and the constants of a tokenizer that rows do not need.

    Args:
        shape: Of the images that the model reads.
        tokens: What the model makes of one: its patches, and what it puts before them.
    """

    shape: Shape
    tokens: int

    pad_token_id: ClassVar[int] = 0
    eos_token_id: ClassVar[int | None] = None
    model_max_length: ClassVar[int] = 1 << 40

    def save_pretrained(self, folder: str | Path) -> None:
        """Nothing: the model's configuration says it all."""


def stacked(images: Sequence[Image]) -> torch.Tensor:
    """`pixel_values` (B, C, H, W) in float32, from 0 to 1."""
    import torch

    rows = [torch.tensor(list(i.pixels), dtype=torch.uint8).view(i.shape) for i in images]
    return torch.stack(rows).to(torch.float32) / 255
