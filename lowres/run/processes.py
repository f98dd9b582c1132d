"""What a recipe must be like for several processes to share its updates."""

from __future__ import annotations

from lowres.core.errors import InputError, Problem
from lowres.core.recipe import Recipe


def check(recipe: Recipe, processes: int) -> None:
    """Raise InputError when they cannot."""
    loop, problems = recipe.loop, []
    if loop.global_batch_size % (loop.micro_batch_size * processes):
        text = (
            f"{loop.global_batch_size} is no multiple of micro_batch_size "
            f"{loop.micro_batch_size} times {processes} processes"
        )
        problems.append(Problem("loop.global_batch_size", text))
    parts = (recipe.method, recipe.freezing, recipe.objective, recipe.optimizer, *recipe.levers)
    for part in parts if processes > 1 else ():
        if why := part.alone():
            text = f"'{part.name}' {why}; or run one process instead of {processes}"
            problems.append(Problem("levers" if part.family == "lever" else part.family, text))
    if problems:
        raise InputError("the recipe", problems)
