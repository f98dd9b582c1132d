"""Hold the frozen matrices of the blocks in 8 bits; multiply with large input features in 16.

Paper: LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, Dettmers et al. 2022.
https://arxiv.org/abs/2208.07339

Departs from the paper: it is trained around, so the backward pass unpacks each matrix; on a CPU the
forward pass does so too while training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from lowres.core.parts import Circumstance, part
from lowres.levers._weights import QuantisedWeights

if TYPE_CHECKING:
    from lowres.core.learner import LoadRequest


@part
class Int8Weights(QuantisedWeights):
    """bitsandbytes' Linear8bitLt: 1 byte a weight, and one scale for each output feature.

    Args:
        threshold: Input features of at least this size are multiplied in 16 bits; 0 for none.
    """

    # A normal matrix is off by 0.0048 with 16 input features, by 0.0094 with 14,336.
    tolerance: ClassVar[float] = 0.015
    brings: ClassVar[frozenset[Circumstance]] = frozenset({"quantised", "int8"})

    # Section 3.2 of the paper.
    threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 6.0

    def on_load(self, request: LoadRequest) -> LoadRequest:
        from lowres.bridges import bitsandbytes

        return bitsandbytes.load_in(8, request, threshold=self.threshold)
