"""Train every weight where the freezing allows it.

Paper: none; the reference line of every comparison.

Departs from the paper: none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from lowres.core.method import Method, Taxonomy
from lowres.core.parts import part

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.recipe import Recipe


@part
class Full(Method):
    """All parameters of the trained blocks, the embeddings, the final norm and the head."""

    searched: ClassVar[bool] = True
    taxonomy: ClassVar[Taxonomy] = "full"
    # Decoders 1e-5 to 5e-5 (Mosbach et al. 2023, https://arxiv.org/abs/2305.16938); the tests and
    # small encoders want more.
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-5, 1e-4)
    mergeable: ClassVar[bool] = True
    trains_weights: ClassVar[bool] = True

    def check(self, recipe: Recipe) -> Iterator[str]:
        if recipe.model.dtype == "float16":
            yield (
                "weights in float16 underflow when they are updated; set model.dtype to float32 or "
                "bfloat16 (loop.precision: fp16 computes in half precision over float32 weights)"
            )
        yield from super().check(recipe)

    def apply(self, model: nn.Module, blocks: Blocks) -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(blocks.trains(name))
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        return model
