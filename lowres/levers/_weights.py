"""What the levers share that load the matrices of a checkpoint in fewer bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from lowres.core.parts import Circumstance, Lever, part

if TYPE_CHECKING:
    from lowres.core.learner import LoadRequest
    from lowres.core.recipe import Recipe


@part
class Weights(Lever):
    """One form in which the matrices are held."""

    effect: ClassVar[Literal["exact", "lossy"]] = "lossy"

    def check(self, recipe: Recipe) -> Iterator[str]:
        for other in recipe.levers:
            if isinstance(other, Weights) and other.name != self.name:
                yield f"'{other.name}' holds the same weights in another form; drop one of the two"


@part
class QuantisedWeights(Weights):
    """Frozen linear layers of the blocks in few bits; everything else stays as it is.

    Embeddings, norms, biases, output and classification heads keep `model.dtype`, and what a method
    adds is trained in the type that it chooses: nothing is widened.
    """

    searched: ClassVar[int | None] = 0
    brings: ClassVar[frozenset[Circumstance]] = frozenset({"quantised"})

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
        yield from super().check(recipe)


@part
class NarrowWeights(Weights):
    """The matrices of linear and embedding layers in 16 bits in a model of float32.

    Norms, biases, buffers and what is made anew for the task keep `model.dtype`, which is also what
    is computed in outside autocast: each matrix is widened while it is multiplied with. Under
    autocast to the same type it is multiplied with as it is. (`model.dtype` in 16 bits holds and
    computes everything so.)
    """

    dtype: ClassVar[str]

    def check(self, recipe: Recipe) -> Iterator[str]:
        held = recipe.model.dtype
        if held != "float32":
            already = "that type" if held == self.dtype else "16 bits"
            yield (
                f"model.dtype is {held}, so all weights are in {already} already; drop the lever, "
                "or set model.dtype to float32 to hold only matrices in 16 bits"
            )
        yield from super().check(recipe)

    def on_load(self, request: LoadRequest) -> LoadRequest:
        return dataclasses.replace(request, matrices=self.dtype)
