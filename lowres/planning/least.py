"""The least that a recipe takes of a device: what it holds from the start, and no step is made."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable

from lowres.bridges import rehearsal, shorten
from lowres.core import host
from lowres.core.errors import InputError
from lowres.core.learner import Learner
from lowres.core.recipe import Recipe
from lowres.making import build, choices
from lowres.memory.tracer import Tracer
from lowres.planning import assumed, scenes

COPIES = 3
"""Beside each trained tensor when AdamW makes its step: the gradient and two states."""


def least_bytes(recipe: Recipe) -> int:
    """Weights as the levers hold them, what the method adds, and for what is trained `COPIES`.

    Of blocks built alike a few are made. Each of the others counts as the least of these; where the
    method does not treat blocks alike, as its frozen weights alone. Activations, workspaces and the
    driver's context are left out, so that a plan needs more.

    Raises:
        InputError: When the method cannot be had with the model.
        TraceFailed: Where the recipe's code needs data.
    """
    try:
        return _held(recipe, whole=False)
    except InputError:
        return _held(recipe, whole=True)  # A method may want more blocks than were left.


def _held(recipe: Recipe, *, whole: bool) -> int:
    later: list[Callable[[], None]] = []
    runs: list[shorten.Run] = []
    frozen: dict[int, int] = {}

    def leave_few(learner: Learner) -> None:
        blocks = learner.blocks
        runs[:] = shorten.runs_of(
            learner.base, blocks.names, dict.fromkeys(blocks.names), not whole
        )
        kept = [place for run in runs for place in run.kept]
        if len(kept) < len(blocks.names):
            names = shorten.shorten(learner.base, blocks.names, kept)
            learner.blocks = dataclasses.replace(blocks, names=names, trained=frozenset(names))
        for fill in later:
            fill()
        frozen.update(_by_block(learner, copies=0))

    tracer = Tracer()
    with (
        rehearsal.rehearsing(), host.planning("cuda"), tracer, tracer.paused(),
        scenes.naming_the_place(tracer),
    ):  # fmt: skip
        tracer.enter("load")
        built = build.assemble(
            recipe, assumed.assumed_inputs(recipe),
            load=functools.partial(rehearsal.load_shapes, later=later), chosen=leave_few,
            choose=lambda learner: learner.blocks,
            apply=functools.partial(choices.expected, recipe, lambda *_: None),
        )  # fmt: skip
        held = _by_block(built.learner, COPIES)
    one = frozen if recipe.method.uneven() else held
    total, first = sum(held.values()), 0
    for run in runs:
        last = first + len(run.kept)
        total += (run.length - len(run.kept)) * min(one[n] for n in range(first, last))
        first = last
    return total


def _by_block(learner: Learner, copies: int) -> dict[int, int]:
    """Bytes by number of the block, or OUTSIDE; tensors that share memory count once."""
    held: dict[int, int] = collections.defaultdict(int)
    seen: set[int] = set()
    for tensor, place, _, _ in scenes.weights_of(learner):
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            held[place] += storage.nbytes() + copies * tensor.nbytes * tensor.requires_grad
    return held
