"""How good a recipe will be: only what records say of recipes like it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lowres.core.parts import values
from lowres.core.recipe import Recipe
from lowres.core.record import RunRecord

UNKNOWN = "no record of this model, task and method"


def of(recipe: Recipe, evidence: Sequence[RunRecord]) -> tuple[float | None, str]:
    """The task's metric, the mean over records of the same model, task and method.

    Returns:
        The mean, None where there is no such record, and how it was had.
    """
    model = recipe.model.checkpoint
    method = {"name": recipe.method.name, **values(recipe.method)}
    found = []
    for record in evidence:
        theirs = record.recipe
        same = (
            record.outcome == "ok"
            and record.trained_on_all
            and theirs["model"]["checkpoint"] == model
            and theirs["task"]["name"] == recipe.task.name
            and {k: theirs["method"].get(k) for k in method} == method
        )
        scores = record.quality(recipe.task.metric)
        if same and scores:
            found.append(scores[0].value)
    if not found:
        return None, UNKNOWN
    return statistics.mean(found), f"mean of {len(found)} record(s)"
