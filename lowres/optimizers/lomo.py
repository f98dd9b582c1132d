"""Plain gradient descent in the backward pass: no states, and no two gradients at once.

Paper: Full Parameter Fine-tuning for Large Language Models with Limited Resources, Lv et al. 2023.
https://arxiv.org/abs/2306.09782

Departs from the paper: gradients are not scaled by their norm, which costs a second backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lowres.core.parts import Circumstance, Optimizer, PositiveFloat, part
from lowres.optimizers._decay import groups

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.engine import Accelerator, Engine
    from lowres.core.learner import Learner
    from lowres.core.recipe import Recipe


@part
class Lomo(Optimizer):
    """torch's SGD without momentum, a parameter at a time.

    Args:
        lr: Peak learning rate; the schedule scales it. Larger than AdamW's: steps are gradients.
        weight_decay: Of matrices; biases, norm weights and entries kept as a list are not decayed.
    """

    brings: ClassVar[frozenset[Circumstance]] = frozenset({"in_backward"})
    sample_fields: ClassVar[Mapping[str, Any]] = {"lr": 1e-2}
    refuses: ClassVar[Mapping[Literal["in_backward", "on_host", "divided"], str]] = {
        "in_backward": "updates in the backward pass by itself; drop the lever",
        "on_host": "has no states to keep there; drop the lever",
        "divided": "updates in the backward pass by itself; use adamw with this lever",
    }

    lr: PositiveFloat
    weight_decay: Annotated[float, Field(ge=0)] = 0.0

    def check(self, recipe: Recipe) -> Iterator[str]:
        from lowres.core import in_backward

        yield from in_backward.refusals(recipe)

    def make(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(groups(parameters, self.weight_decay), lr=self.lr, foreach=False)

    def engine(
        self, accelerator: Accelerator, learner: Learner, optimizer: torch.optim.Optimizer
    ) -> Engine:
        from lowres.core.in_backward import UpdatesInBackward

        return UpdatesInBackward(super().engine(accelerator, learner, optimizer), self.name)
