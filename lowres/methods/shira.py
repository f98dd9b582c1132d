"""Train a random few entries of each weight, as a sparse change beside it.

Paper: Sparse High Rank Adapters, Bhardwaj et al. 2024. https://arxiv.org/abs/2406.13175

Departs from the paper: the random mask alone (the paper also has structured, magnitude and
gradient masks).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import Circumstance, PositiveInt, part
from lowres.methods._injected import Injected

if TYPE_CHECKING:
    from lowres.core.recipe import Recipe


@part
class Shira(Injected):
    """`y = (W + S) x` with S sparse, from zero, at places drawn once; the places are saved.

    Every forward pass makes W + S, which is as large as the weight, and so does the gradient.

    Args:
        rank: As many entries as LoRA of this rank has parameters, rank (i + o).
        mask_seed: Of the places.
        targets: `paper` (queries and values), `all-linear`, or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "selective"
    # The range of lora.
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-5, 1e-3)
    sample_fields: ClassVar[Mapping[str, Any]] = {"rank": 2}
    refuses: ClassVar[Mapping[Circumstance, str]] = {
        "divided": "W + S wants the whole weight, of which a process may hold a part; use lora",
    }
    config: ClassVar[str] = "ShiraConfig"

    rank: PositiveInt = 8
    mask_seed: int = 0

    def check(self, recipe: Recipe) -> Iterator[str]:
        yield from super().check(recipe)
        if recipe.loop.precision == "no" and recipe.model.dtype != "float32":
            for lever in recipe.levers:
                if "int8" in lever.brings:
                    yield (
                        f"beside '{lever.name}' S is multiplied in float32 with an input in "
                        f"{recipe.model.dtype}, which autocast alone brings together; set "
                        "loop.precision to bf16"
                    )

    def settings(self) -> Mapping[str, Any]:
        return {"r": self.rank, "random_seed": self.mask_seed}

    def misfit(self, inputs: int, outputs: int) -> str | None:
        most = inputs * outputs // (inputs + outputs)
        if self.rank > most:
            return (
                f"rank {self.rank} asks for more entries than there are; set it to at most {most}"
            )
        return None
