"""What a run chooses by its data before the method is in the model: made, kept, expected."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lowres.core.choosing import Choosing
from lowres.core.scored import Scored

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.learner import Learner
    from lowres.core.recipe import Recipe
    from lowres.core.sample import Sample


def apply(recipe: Recipe, learner: Learner, sample: Sample) -> nn.Module:
    """The learner's model with the method in it; the main process chooses for all."""
    from lowres.bridges import peft_tuner
    from lowres.bridges.accelerate import agreed

    method = recipe.method
    if not isinstance(method, Choosing):
        return method.apply(learner.base, learner.blocks)
    found = dict(agreed(list(method.decide(method.observe(learner, sample)).items())))
    made = method.put(learner.base, learner.blocks, {p: len(e) for p, e in found.items()})
    for path, entries in peft_tuner.entries_of(made).items():
        entries.copy_(found[path])
    return made


def again(
    recipe: Recipe, counts: Mapping[str, int] | None
) -> Callable[[Learner], nn.Module] | None:
    """Takes the place of `apply` where the choice was made before, and the places lie in a
    checkpoint that will be loaded; None where it was not."""
    return None if counts is None else functools.partial(_put, recipe, counts)


def expected(
    recipe: Recipe,
    look: Callable[[Callable[[Learner, Sample], object], Learner], None],
    learner: Learner,
) -> nn.Module:
    """Takes the place of `apply` for a plan: as many entries as it will be, evenly spread.

    Args:
        look: Called with what looks at the training rows.
    """
    if not isinstance(recipe.method, Choosing):
        return recipe.method.apply(learner.base, learner.blocks)
    look(recipe.method.observe, learner)
    return _put(recipe, recipe.method.expected(learner.base, learner.blocks), learner)


def _put(recipe: Recipe, counts: Mapping[str, int], learner: Learner) -> nn.Module:
    assert isinstance(recipe.method, Choosing)
    return recipe.method.put(learner.base, learner.blocks, counts)


def made(recipe: Recipe, learner: Learner) -> tuple[list[str] | None, dict[str, int] | None]:
    """Blocks and numbers of entries that were chosen by data, for a checkpoint."""
    from lowres.bridges import peft_tuner

    blocks = sorted(learner.blocks.trained) if isinstance(recipe.freezing, Scored) else None
    if not isinstance(recipe.method, Choosing):
        return blocks, None
    return blocks, {p: e.numel() for p, e in peft_tuner.entries_of(learner.base).items()}
