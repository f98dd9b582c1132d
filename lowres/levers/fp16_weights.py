"""Hold the frozen matrices in float16 in a model of float32: 2 bytes a weight instead of 4.

Paper: Mixed Precision Training, Micikevicius et al. 2017. https://arxiv.org/abs/1710.03740

Departs from the paper: there is no float32 copy, because matrices that are held so are not trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from lowres.core.parts import part
from lowres.levers._weights import NarrowWeights

if TYPE_CHECKING:
    from lowres.core.recipe import Recipe


@part
class Fp16Weights(NarrowWeights):
    """11 bits of precision, numbers up to 65504; for cards before Ampere, which have no bfloat16
    units. Loading a checkpoint with larger weights ends in an error.
    """

    tolerance: ClassVar[float] = 2**-11  # half of the last of 11 bits, in each weight
    dtype: ClassVar[str] = "float16"

    def check(self, recipe: Recipe) -> Iterator[str]:
        if recipe.method.trains_weights:
            yield (
                f"'{recipe.method.name}' trains the matrices, and updates of float16 weights "
                "underflow; use bf16_weights, a method that adds parameters (lora, bitfit), or "
                "loop.precision: fp16 over float32 weights"
            )
        yield from super().check(recipe)
