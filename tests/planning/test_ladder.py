"""The lever ladder against full plans of the changed recipes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from lowres.core.plan import Change, MemoryPlan
from lowres.core.reading import load_recipe
from lowres.memory import device as devices
from lowres.planning.ladder import ladder
from lowres.planning.plan import host_limit, plan
from lowres.run.foresight import refusal
from tests.conftest import sampled

WIDE = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 4000, "num_hidden_layers": 6}
SEGMENTS = 6 << 20
SIZES = {"micro_batch_size": 2, "global_batch_size": 4, "max_length": 512}


def changed(recipe: Any, change: Change, device: Any) -> MemoryPlan:
    return plan(load_recipe(recipe.resolved(), change.overrides), device)


@pytest.mark.parametrize(
    "name", sampled(["lever gradient_checkpointing", "micro-batch 1"], every=2)
)
def test_a_line_is_what_the_full_plan_of_the_change_says(
    name: str, planned_recipe: Callable[..., Any]
) -> None:
    """Reference: the full plan, within 1 % or the rounding of three segments."""
    recipe, device = planned_recipe(WIDE, loop=SIZES), devices.generic(4.0)
    (line,) = ladder(recipe, device, plan(recipe, device), name)
    there = changed(recipe, line, device)
    assert line.needed_bytes == pytest.approx(there.needed_bytes, rel=0.01, abs=SEGMENTS)
    assert line.fits == there.fits


def test_what_moves_to_the_host_is_compared_with_its_memory(
    planned_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: states fit the card, and beside it there is room for none of them."""
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=1 << 30))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    sizes = {"micro_batch_size": 1, "global_batch_size": 2, "max_length": 32}
    small = {"vocab_size": 4000, "num_hidden_layers": 2}
    recipe, device = planned_recipe(small, method="full", loop=sizes), devices.generic(4.0)
    needed = plan(recipe, device).host_needed_bytes
    name = "lever optimizer_offload"
    for spare, fits in ((4 << 30, True), (1 << 19, False)):
        limit = f"budget.host_gib={(needed + spare) / 2**30}"
        limited = load_recipe(recipe.resolved(), [limit])
        found = plan(limited, device)
        assert found.fits and found.host_fits
        (line,) = ladder(limited, device, found, name)
        assert line.fits == fits


@pytest.mark.slow
def test_each_line_is_what_the_full_plan_of_the_change_says(
    planned_recipe: Callable[..., Any],
) -> None:
    """Reference: full plans, within 1 % or the rounding of three segments."""
    recipe, device = planned_recipe(WIDE, loop=SIZES), devices.generic(4.0)
    found = plan(recipe, device)
    lines = [c for c in ladder(recipe, device, found) if c.problem is None]
    assert {"lever gradient_checkpointing", "micro-batch 1", "length 256"} <= {
        c.name for c in lines
    }
    for change in lines:
        there = changed(recipe, change, device)
        assert change.needed_bytes == pytest.approx(there.needed_bytes, rel=0.01, abs=SEGMENTS)
        assert change.fits == there.fits


@pytest.mark.slow
def test_what_is_said_to_make_it_fit_does(planned_recipe: Callable[..., Any]) -> None:
    """Reference: full plans on a card that lies between the recipe's need and the least one."""
    recipe = planned_recipe(WIDE, loop=SIZES)
    needed = plan(recipe, devices.generic(4.0)).needed_bytes
    device = devices.generic((needed - (40 << 20)) / 2**30)
    found = plan(recipe, device)
    assert found.fits is False
    lines = [c for c in ladder(recipe, device, found) if c.fits]
    assert lines
    for change in lines:
        assert changed(recipe, change, device).fits is True, change.name


@pytest.mark.slow
def test_an_evaluation_that_does_not_fit_is_not_helped_by_checkpointing(
    planned_recipe: Callable[..., Any],
) -> None:
    """Behaviour: savings of the steps alone are not promised where another phase is the peak."""
    sizes = {"micro_batch_size": 1, "global_batch_size": 2, "max_length": 128}
    recipe = planned_recipe(WIDE, loop=sizes | {"eval_batch_size": 64})
    device = devices.generic(4.0)
    found = plan(recipe, device)
    assert found.peak_phase == "evaluate"
    lines = {c.name: c for c in ladder(recipe, device, found)}
    saved = lines["lever gradient_checkpointing"].saved_bytes
    assert saved is not None and abs(saved) <= SEGMENTS, "two segments at most"


@pytest.mark.slow
def test_a_refusal_for_host_memory_says_what_would_help(
    planned_recipe: Callable[..., Any],
) -> None:
    """Behaviour: on a CPU the changes are judged by the host's memory."""
    recipe, device = planned_recipe(WIDE, loop=SIZES), devices.load("cpu")
    needed = plan(recipe, device).host_needed_bytes
    small = load_recipe(recipe.resolved(), [f"budget.host_gib={(needed - (8 << 20)) / 2**30}"])
    found = plan(small, device)
    found.changes = ladder(small, device, found)
    assert found.host_fits is False
    assert any(c.fits for c in found.changes) and any(c.fits is False for c in found.changes)
    assert "gradient_checkpointing" in refusal(found, host_limit(small, device))
