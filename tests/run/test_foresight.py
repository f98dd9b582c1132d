"""A plan that does not fit, as `lowres run` refuses it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lowres
from lowres.core.errors import DoesNotFit
from lowres.core.plan import Change, MemoryPlan
from lowres.memory import device as devices
from lowres.run import foresight

GIB = 1 << 30
TOLD = "the plan needs 3.00 GiB of host memory, "


@pytest.fixture
def weighed(monkeypatch: pytest.MonkeyPatch) -> list[MemoryPlan]:
    """The plans for which changes were weighed; none is."""
    plans: list[MemoryPlan] = []

    def note(recipe: Any, device: Any, found: MemoryPlan) -> list[Change]:
        plans.append(found)
        return []

    monkeypatch.setattr(foresight, "ladder", note)
    return plans


def stopped(
    recipe: Any, folder: Path, needed_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, ...]:
    """The lines of the refusal of a run whose plan needs so much of the host."""
    plain = foresight.plan

    def plan(*words: Any, **names: Any) -> MemoryPlan:
        found = plain(*words, **names)
        return dataclasses.replace(found, host_needed_bytes=needed_bytes, host_fits=False)

    monkeypatch.setattr(foresight, "plan", plan)
    with pytest.raises(DoesNotFit) as caught:
        lowres.run(recipe, output_folder=folder / "out")
    assert caught.value.exit_code == 3
    return tuple(str(caught.value).splitlines())


def test_a_budget_below_the_process_alone_is_refused_without_weighing_changes(
    recipe: Callable[..., Any], tmp_path: Path, weighed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: the first line names the need, the limit and whose it is."""
    one = recipe(budget={"host_gib": 0.01})
    lines = stopped(one, tmp_path, 3 * GIB, monkeypatch)
    assert lines[0].startswith(TOLD + "budget.host_gib 0.01 allows 10.2 MiB; nothing was loaded.")
    assert "No change to the recipe helps: with nothing loaded this process holds" in lines[0]
    assert "raise budget.host_gib to 3 (" in lines[0] and not weighed


@pytest.mark.parametrize("budget", [{"host_gib": 2.5}, {}])
def test_changes_are_weighed_after_a_word_that_they_are(
    budget: dict[str, float], recipe: Callable[..., Any], tmp_path: Path, weighed: list[Any],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Behaviour: and without a budget the limit is the machine's memory."""
    lines = stopped(recipe(budget=budget), tmp_path, 3 * GIB, monkeypatch)
    limit = "budget.host_gib 2.5 allows 2.50 GiB" if budget else "this machine has "
    assert lines[0].startswith(TOLD + limit), lines[0]
    assert len(weighed) == 1 and "does not fit; weighing changes" in capsys.readouterr().err
    assert "no single change is enough" in lines[1]


def test_a_limit_of_the_host_is_the_budget_or_this_machine(
    recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed form: of a card that is not here nothing is known of its host."""
    from lowres.planning.plan import host_limit

    with_budget, without = recipe(budget={"host_gib": 2}), recipe()
    assert host_limit(with_budget, devices.load("t4")) == (2 * GIB, "budget.host_gib 2 allows")
    assert host_limit(without, devices.load("t4")) is None
    limit = host_limit(without, devices.load("cpu"))
    assert limit is not None and limit[1] == "this machine has"
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    shared = host_limit(without, devices.load("cpu"), 4)
    assert shared == (limit[0] // 4, "this machine has for each of 4 processes")
    assert host_limit(with_budget, devices.load("cpu"), 4) == (2 * GIB, "budget.host_gib 2 allows")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of two machines
    shared = host_limit(without, devices.load("cpu"), 4)
    assert shared == (limit[0] // 2, "this machine has for each of 2 processes")
