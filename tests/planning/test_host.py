"""Plans for a GPU of what is kept in host memory on purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from lowres.memory import device as devices
from lowres.planning.plan import host_fits, plan

LEVER = [{"name": "optimizer_offload"}]
CARD = devices.generic(8.0)


def of_two(planned_recipe: Callable[..., Any], exact: bool, **changes: Any) -> tuple[Any, Any, int]:
    """Plans of a recipe without the lever and with it, and the bytes of its states."""
    without = plan(planned_recipe(**changes), CARD, exact=exact)
    levers = [*changes.pop("levers", []), *LEVER]
    there = plan(planned_recipe(levers=levers, **changes), CARD, exact=exact)
    return without, there, without.phases["steady_steps"].categories["optimizer states"]


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("method", ["full", {"name": "lora", "rank": 4, "targets": "all-linear"}])
def test_a_plan_for_a_gpu_has_the_states_on_the_host(
    method: Any, exact: bool, planned_recipe: Callable[..., Any]
) -> None:
    """Closed form: two states of each parameter's own bytes and one step counter each; on the host
    the same, with two staging buffers of the largest parameter, rounded up to a power of two."""
    without, there, states = of_two(planned_recipe, exact, method=method)
    width, count = (2, 9 * 9 + 3) if method == "full" else (4, 9 * 7 * 2)
    assert states == 2 * width * without.trainable + 4 * count
    for phase in ("steady_steps", "save", "evaluate", "resume"):
        on_device, on_host = (p.phases[phase].categories for p in (without, there))
        assert on_device["optimizer states"] == states
        assert "optimizer states" not in on_host
    saved = without.phases["evaluate"].live_bytes - there.phases["evaluate"].live_bytes
    assert saved == states
    staging = there.phases["steady_steps"].host_bytes - states
    assert staging > 0 and staging & (staging - 1) == 0
    assert staging <= states
    assert there.host_needed_bytes > there.phases["resume"].host_bytes >= states
    assert there.step is not None and there.step.parts["transfers"] > 0


def test_in_the_backward_pass_neither_gradients_nor_states_are_on_the_device(
    planned_recipe: Callable[..., Any],
) -> None:
    """Behaviour: the two levers together, over the extended depth and over the whole."""
    loop = {"micro_batch_size": 2, "max_grad_norm": None}
    both = [{"name": "optimizer_in_backward"}, *LEVER]
    plans = [
        plan(planned_recipe(method="full", loop=loop, levers=both), CARD, exact=exact)
        for exact in (False, True)
    ]
    for found in plans:
        assert "optimizer states" not in found.phases["steady_steps"].categories
    first, second = ({n: (p.live_bytes, p.host_bytes) for n, p in f.phases.items()} for f in plans)
    assert first == second


def test_host_memory_is_compared_where_the_card_is_in_this_machine(
    planned_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: of a card named in a plan nothing is known about its host; one that was found here
    is beside this machine's memory, which may be too small."""
    recipe = planned_recipe(levers=LEVER)
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(total=2**20))
    assert host_fits(recipe, 2**21, CARD) is None
    here = dataclasses.replace(CARD, uuid="GPU-0")
    assert host_fits(recipe, 2**21, here) is False
    assert host_fits(recipe, 2**19, here) is True
