"""Hold the matrices in bfloat16 in a model of float32: 2 bytes a weight instead of 4.

Paper: none; bfloat16 is described in A Study of BFLOAT16 for Deep Learning Training, Kalamkar et
al. 2019. https://arxiv.org/abs/1905.12322

Departs from the paper: no float32 copy of trained matrices is kept; they are updated in bfloat16.
"""

from __future__ import annotations

from typing import ClassVar

from lowres.core.parts import part
from lowres.levers._weights import NarrowWeights


@part
class Bf16Weights(NarrowWeights):
    """8 bits of precision, the range of float32. Trained matrices are held so, too: an update
    smaller than 1/512 of a weight is lost, and one below 1/256 of it may be.
    """

    tolerance: ClassVar[float] = 2**-8  # half of the last of 8 bits, in each weight
    dtype: ClassVar[str] = "bfloat16"
