"""Recomputing every k-th block: which blocks, how many bytes, and a plan that is never extended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lowres
from lowres.core.errors import InputError
from lowres.making.build import build
from lowres.making.gradients import micro_batches
from lowres.memory import device as devices
from lowres.planning.plan import plan
from tests.conftest import KINDS, sampled
from tests.planning.conftest import config_folder, planned_recipe
from tests.updates import SMOOTH, compare, peak_bytes

__all__ = ["config_folder", "planned_recipe"]


def every(k: int) -> list[dict[str, Any]]:
    return [{"name": "gradient_checkpointing", "every": k}]


@pytest.mark.parametrize("kind", KINDS)
def test_every_second_block_is_recomputed(kind: str, recipe: Callable[..., Any]) -> None:
    """Closed form: calls of each block in one step; two where it is recomputed, else one."""
    one = recipe(kind, levers=every(2))
    built = build(one)
    built.model.train()
    calls = dict.fromkeys(built.learner.blocks.names, 0)

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    for name in calls:
        # Recomputing a block stops where all is there that is needed; its first module is counted.
        first = next(m for m in built.model.get_submodule(name).modules() if not [*m.children()])
        first.register_forward_pre_hook(count(name))
    (batch,) = micro_batches(one, built.learner, built.train_rows[:4], 4)
    one.objective.loss(built.learner, batch).backward()
    assert list(calls.values()) == [2 - number % 2 for number in range(len(calls))]


@pytest.mark.parametrize("kind", KINDS)
def test_every_second_block_changes_no_update(
    kind: str, recipe: Callable[..., Any], awake: dict[str, Path]
) -> None:
    """Reference: the recipe without the lever; its peak lies between none and all."""
    model = {"checkpoint": str(awake[kind])}
    make = lambda levers: recipe(kind, model=model, levers=levers, method="lora", optimizer=SMOOTH)
    compare(make([]), make(every(2)))
    compare(make([]), make(every(1)))
    assert peak_bytes(make(every(1))) < peak_bytes(make(every(2))) < peak_bytes(make([]))


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 3])
def test_a_plan_traces_every_block(k: int, planned_recipe: Callable[..., Any]) -> None:
    """Reference: the plan with `exact`; with 3 the two inner blocks that would be traced are alike,
    and stand for none of the others."""
    one, card = planned_recipe(levers=every(k)), devices.generic(8.0)
    found, whole = plan(one, card), plan(one, card, exact=True)
    assert found.phases == whole.phases and found.needed_bytes == whole.needed_bytes
    assert found.depth == "all 9 blocks traced"
    assert any(f"one of {k} blocks" in note for note in found.notes)
    there = plan(planned_recipe(levers=every(1)), card)
    assert there.phases["steady_steps"].live_bytes < found.phases["steady_steps"].live_bytes


@pytest.mark.parametrize("kind", sampled(KINDS, every=3))
def test_planned_bytes_are_measured_bytes(
    kind: str, recipe: Callable[..., Any], in_folder: Any
) -> None:
    """Reference: a real run; steps and evaluation to the byte."""
    record = lowres.run(recipe(kind, levers=every(2)), quiet=True)
    assert record.plan is not None, record.events
    for phase in ("first_step", "steady_steps", "evaluate"):
        planned = record.plan["phases"][phase]["live_bytes"]
        assert planned == record.measured.phases[phase].live_bytes, phase  # type: ignore[index]


def test_no_block_is_refused(recipe: Callable[..., Any]) -> None:
    """Behaviour: 0 is no distance."""
    with pytest.raises(InputError, match="every"):
        recipe(levers=every(0))
