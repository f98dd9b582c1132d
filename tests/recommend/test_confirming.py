"""The choice among weighed candidates: what is tried first, for how long, when more is sought."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from lowres.core.errors import InputError
from lowres.core.plan import Candidate
from lowres.core.units import GIB
from lowres.making import build
from lowres.memory import device as devices
from lowres.planning.starting import starting_recipe
from lowres.recommend import confirming, fit
from lowres.recommend.combinations import Combination, stages
from lowres.recommend.ranking import Choice


def choice(recipe: Any, number: int, **changes: Any) -> Choice:
    """A candidate of so many bytes on the device, best first."""
    settings = {"method": str(number)}
    candidate = Candidate(settings, number, True, 60.0, 1.0 / number, None, "no record", [])
    combination = Combination(recipe, {}, settings, (), preference=number)
    return dataclasses.replace(Choice(candidate, combination, 4, 32), **changes)


def test_what_keeps_more_in_host_memory_than_there_is_uses_up_no_tries(
    recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: twenty recipes that rank before it are not planned."""
    limited = recipe(budget={"host_gib": 1.0})
    asked = [choice(limited, n, host_bytes=2 * GIB) for n in range(1, 21)]
    asked.append(choice(limited, 21, host_bytes=GIB // 2))
    planned: list[Choice] = []

    def plan(wanted: Choice, device: Any) -> Any:
        planned.append(wanted)
        return SimpleNamespace(
            needed_bytes=1, band_bytes=0, host_fits=wanted.host_bytes <= GIB, wanted=wanted
        )

    monkeypatch.setattr(confirming, "recipe_of", lambda one: one)
    monkeypatch.setattr(confirming, "plan", plan)
    device = devices.generic(1.0)
    chosen, _ = confirming.choose(asked, device, devices.card(device, 1.0), "quality", [])
    assert chosen is asked[-1] and planned == [chosen]


def test_minutes_are_those_of_rows_as_long_as_they_are(recipe: Callable[..., Any]) -> None:
    """Closed form: a minute for an update of rows as long as allowed, times the share of padded
    tokens, times 4 updates."""
    one = recipe()
    data = build.read(one).data
    data.train = [
        dataclasses.replace(row, inputs={k: [1] * 8 for k in row.inputs}) for row in data.train
    ]
    pool = [choice(one, 1)]
    assert confirming.in_time(pool, data, 1.01, []) == pool
    with pytest.raises(InputError, match="planned to take 1"):
        confirming.in_time(pool, data, 0.99, [])


def test_more_is_sought_where_the_full_plan_refuses_what_seemed_to_fit(
    config_folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: the next stage is searched, and what it brings in may be chosen."""
    real, choose = fit.combinations, fit.choose
    sought: list[int] = []
    pools: list[list[Choice]] = []

    def few(start: Any, blocks: int, stage: int) -> Any:
        sought.append(stage)
        return itertools.islice(real(start, blocks, stage), 1)

    def refusing(pool: Any, *given: Any) -> Any:
        pools.append(pool)
        return (None, None) if len(pools) == 1 else choose(pool, *given)

    monkeypatch.setattr(fit, "combinations", few)
    monkeypatch.setattr(fit, "choose", refusing)
    model = config_folder(hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    found = fit.fit(model, "gsm8k", devices.generic(4.0), device_gib=4.0)
    assert sought == [0, 1] and found.chosen is not None
    assert len(pools[1]) > len(pools[0])


def test_the_longest_rows_are_sought_beyond_those_of_other_goals(
    config_folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: with room for them, as long as the model's positions allow."""
    real = fit.combinations
    monkeypatch.setattr(fit, "combinations", lambda *given: itertools.islice(real(*given), 1))
    model = config_folder(hidden_size=64, num_hidden_layers=2, max_position_embeddings=8192 + 512)
    for goal, length in (("context", 8192), ("quality", 512)):
        found = fit.fit(model, "gsm8k", devices.generic(48.0), device_gib=48.0, goal=goal)  # type: ignore[arg-type]
        assert found.chosen is not None
        assert found.candidates[found.chosen].settings["length"] == length


def test_a_task_without_logits_of_words_is_searched_at_every_stage() -> None:
    """Behaviour: a lever of an early stage that it refuses is left out of the later ones."""
    start = starting_recipe("package:lowres/assets/tiny_lm", "grammaticality")
    start = start | {"objective": {"name": "classification"}}
    for stage in stages():
        found = fit.combinations(start, 2, stage)
        levers = {name for one in found for name in one.settings["levers"].split(" + ")}
        assert levers and "chunked_logits" not in levers
    assert "activation_offload" in levers
