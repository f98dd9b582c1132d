"""What a recipe must be like for several processes to share its updates."""

from __future__ import annotations

from lowres.core.errors import InputError, Problem
from lowres.core.recipe import Recipe
from lowres.core.rotation import Rotating


def check(recipe: Recipe, processes: int) -> None:
    """Raise InputError when they cannot."""
    loop, freezing = recipe.loop, recipe.freezing
    problems = []
    if loop.global_batch_size % (loop.micro_batch_size * processes):
        text = (
            f"{loop.global_batch_size} is no multiple of micro_batch_size "
            f"{loop.micro_batch_size} times {processes} processes"
        )
        problems.append(Problem("loop.global_batch_size", text))
    if processes > 1 and isinstance(freezing, Rotating):
        text = (
            f"'{freezing.name}' changes what is trained, and {processes} processes agree once on "
            "what they exchange; run one process, or use freezing 'prefix'"
        )
        problems.append(Problem("freezing", text))
    if problems:
        raise InputError("the recipe", problems)
