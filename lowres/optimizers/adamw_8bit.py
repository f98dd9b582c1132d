"""AdamW with its states in 8 bits: 2 bytes a trained parameter instead of 8.

Paper: 8-bit Optimizers via Block-wise Quantization, Dettmers et al. 2021.
https://arxiv.org/abs/2110.02861

Departs from the paper: blocks of 256 elements instead of 2,048 (as bitsandbytes does); no layer
norm is added to embeddings; biases and norm weights are not decayed.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from lowres.core.parts import part
from lowres.optimizers._bitsandbytes import BlockwiseAdamw


@part
class Adamw8bit(BlockwiseAdamw):
    """bitsandbytes' AdamW8bit. On a CPU it is slower than AdamW, and serves to try a recipe out."""

    searched: ClassVar[bool] = True
    variant: ClassVar[Literal["AdamW8bit", "PagedAdamW8bit"]] = "AdamW8bit"
