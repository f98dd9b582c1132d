"""What the levers share that load the matrices of the blocks in fewer bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from lowres.core.parts import Lever, part

if TYPE_CHECKING:
    from lowres.core.recipe import Recipe


@part
class QuantisedWeights(Lever):
    """Frozen linear layers of the blocks in few bits; everything else stays as it is.

    Embeddings, norms, biases, output and classification heads keep `model.dtype`, and what a method
    adds is trained in the type that it chooses: nothing is widened.
    """

    effect: ClassVar[Literal["exact", "lossy"]] = "lossy"
    searched: ClassVar[int | None] = 0

    def check(self, recipe: Recipe) -> Iterator[str]:
        if recipe.method.trains_weights:
            yield (
                "it holds matrices in a form that cannot be trained, which "
                f"'{recipe.method.name}' would train; use a method that adds parameters (lora, "
                "bitfit), or drop the lever"
            )
        if recipe.model.init == "random":
            yield (
                "it quantises the weights of a checkpoint, and model.init is random; set it to "
                "pretrained, or drop the lever"
            )
        for other in recipe.levers:
            if isinstance(other, QuantisedWeights) and other.name != self.name:
                yield f"'{other.name}' quantises the same weights; drop one of the two"
