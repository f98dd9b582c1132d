"""What is trained: the base of every method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from lowres.core.parts import Circumstance, Part, part

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.recipe import Recipe

Taxonomy = Literal[
    "full",
    "additive: adapters",
    "additive: soft prompts",
    "additive: other",
    "selective",
    "reparametrisation",
    "hybrid",
]
"""Classes of Scaling Down to Scale Up, section 4 (https://arxiv.org/abs/2303.15647)."""


@part
class Method(Part):
    """A member of the family."""

    family: ClassVar[str] = "method"
    taxonomy: ClassVar[Taxonomy]
    """Written in the file of each, where `lowres list` reads it."""
    learning_rate_hint: ClassVar[tuple[float, float]]
    mergeable: ClassVar[bool]
    searched: ClassVar[bool] = False
    """Whether `lowres fit` weighs it without being asked."""
    trains_weights: ClassVar[bool] = False
    """Whether it changes the matrices of the checkpoint themselves, which then cannot be held in
    fewer bits, and not only what it adds beside them."""
    starts_as_base: ClassVar[bool] = True
    """Whether the model's outputs are those of the checkpoint before the first update."""
    draws: ClassVar[bool] = False
    """Whether each forward pass in training draws numbers, so that rows that are divided otherwise
    into micro-batches meet others."""
    may_rest: ClassVar[str | None] = None
    """The last part of the names of trained parameters whose gradient may be nothing for long."""
    refuses: ClassVar[Mapping[Circumstance, str]] = {}
    """Why it cannot work so, with what to do instead; nothing where it can."""

    @classmethod
    def few_bits(cls) -> list[Literal["nf4", "int8"]]:
        """Forms of weights in fewer bits beside which it works."""
        kinds: tuple[Literal["nf4", "int8"], ...] = ("nf4", "int8")
        if cls.trains_weights or "quantised" in cls.refuses:
            return []
        return [kind for kind in kinds if kind not in cls.refuses]

    def check(self, recipe: Recipe) -> Iterator[str]:
        parts = (recipe.freezing, recipe.objective, recipe.optimizer, recipe.procedure)
        for other in (*parts, *recipe.levers):
            for circumstance in sorted(other.brought() & self.refuses.keys()):
                yield f"beside '{other.name}': {self.refuses[circumstance]}"

    def apply(self, model: nn.Module, blocks: Blocks) -> nn.Module:
        """Mark or add the trained parameters, within `blocks`; what is returned replaces `model`.

        Raises InputError when the model has nothing that this method could train.
        """
        raise NotImplementedError

    def merge(self, model: nn.Module) -> nn.Module:
        """The plain model with what was learned folded in."""
        raise NotImplementedError

    def positions(self) -> int:
        """How many positions of the model it takes before each row."""
        return 0

    def uneven(self) -> str | None:
        """Why blocks built alike do not work alike under it, so that a plan traces all of them."""
        return None

    def before_update(self, model: nn.Module, step: int, total: int) -> None:
        """Called before the gradients of update `step` of `total`."""

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        """What is added to the mean loss of each update, a scalar in float32; None for nothing."""
        return None

    def after_gradients(self, model: nn.Module, step: int, total: int) -> None:
        """Called with the gradients of update `step` in place, before the optimizer's step."""

    def after_update(self, model: nn.Module, step: int, total: int) -> None:
        """Called when update `step` of `total` was made and its gradients are gone."""

    def state(self, model: nn.Module) -> Mapping[str, torch.Tensor]:
        """What a resumed run needs of it besides the trained parameters, for a checkpoint."""
        return {}

    def restore(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave; called before the first update of a resumed run."""
