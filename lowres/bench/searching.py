"""How a suite chooses one hyperparameter before its seeds are run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from lowres.core.parts import part
from lowres.core.recipe import Recipe
from lowres.core.record import Score


@part
class Search:
    """How a value is chosen before the seeds are run.

    Args:
        key: The recipe key that is searched.
        values: For each recipe the values to try; equally many for all, so that none is favoured.
        times_hint: In place of `values`: factors on the upper end of the learning rates that the
            recipe's method recommends.
        then_times: On tasks after the first, in place of all that: factors on what the first chose.
        settings: `key=value` changes for the search runs, such as held-out rows to score on.
        split, metric: What decides. Without a metric the task's main one. Of the values whose score
            is within one standard error of the best, what the first task chose is taken, else the
            smallest: the final runs are longer, and at the largest rate that one run survived
            another seed may fail.
    """

    key: str
    settings: tuple[str, ...]
    split: str
    metric: str | None = None
    values: dict[str, tuple[float, ...]] = field(default_factory=dict)
    times_hint: tuple[float, ...] = ()
    then_times: tuple[float, ...] = ()


def to_try(search: Search, name: str, plain: Recipe, before: float | None) -> list[float]:
    """Values of a search, from small to large; `before` is what an earlier task chose."""
    if before is not None and search.then_times:
        made = [before * factor for factor in search.then_times]
    elif name in search.values:
        return sorted(search.values[name])
    else:
        highest = plain.method.learning_rate_hint[1]
        made = [highest * factor for factor in search.times_hint]
    return sorted(float(f"{value:.3g}") for value in made)


def as_good_as_best(
    scores: Mapping[float, Score], before: float | None = None, sign: float = 1.0
) -> float:
    """The smallest value that scores as the best one does, but for one standard error; if it is one
    of them, what was chosen `before`. `sign` is -1 where lower scores are better.
    """
    top = max(scores.values(), key=lambda score: sign * score.value)
    enough = sign * top.value - top.stderr
    good = [value for value, s in scores.items() if sign * s.value >= enough]
    return before if before in good else min(good)
