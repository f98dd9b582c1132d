"""Update each parameter in the backward pass and free its gradient: gradients never exist together.

Paper: none. The idea is in Full Parameter Fine-tuning for Large Language Models with Limited
Resources, Lv et al. 2023, https://arxiv.org/abs/2306.09782, for plain gradient descent; torch has
the hooks, https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html

Departs from the paper: any optimizer that treats each parameter by itself, with its states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lowres.core.parts import Circumstance, Lever, part

if TYPE_CHECKING:
    from lowres.core.engine import Engine
    from lowres.core.recipe import Recipe


@part
class OptimizerInBackward(Lever):
    """Saves the gradients of all trained parameters but those being worked on.

    The weights change while the backward pass goes on: a loss that is not finite is found out too
    late for its update, and memory that runs out ends the run instead of halving the micro-batch.
    """

    brings: ClassVar[frozenset[Circumstance]] = frozenset({"in_backward"})
    effect: ClassVar[Literal["exact", "lossy"]] = "exact"
    sample_recipe: ClassVar[Mapping[str, Any]] = {
        "loop": {"micro_batch_size": 8, "max_grad_norm": None}
    }

    def check(self, recipe: Recipe) -> Iterator[str]:
        from lowres.core import in_backward

        yield from in_backward.refusals(recipe)
        for lever in recipe.levers:
            if "updated_apart" in lever.brought():
                yield (
                    f"'{lever.name}' takes each gradient away and updates by itself when all are "
                    "there; drop one of the two"
                )
        reason = recipe.optimizer.refuses.get("in_backward")
        if reason is not None:
            yield f"'{recipe.optimizer.name}' {reason}"

    def on_engine(self, engine: Engine) -> Engine:
        from lowres.core.in_backward import UpdatesInBackward

        return UpdatesInBackward(engine, self.name)
