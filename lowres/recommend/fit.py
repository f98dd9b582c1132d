"""What is the best that fits? A search over recipes with a closed form for each combination."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import yaml

from lowres.bridges.kinds import kind_of
from lowres.core import record as records
from lowres.core.errors import InputError, LowresError
from lowres.core.plan import Candidate, Card, Fit
from lowres.core.reading import load_recipe
from lowres.core.recipe import Recipe
from lowres.core.units import GIB
from lowres.memory import device as devices
from lowres.memory.catalogue import Device
from lowres.memory.closed_form import ClosedForm, probe_lengths
from lowres.memory.extend import DoesNotRepeat
from lowres.memory.trace import Trace
from lowres.planning import assumed
from lowres.planning.plan import rates_of, room_of, target_of, waiting_bytes
from lowres.planning.rehearsal import rehearse
from lowres.planning.starting import starting_recipe
from lowres.recommend import planned_quality
from lowres.recommend.combinations import LENGTHS, LONG, ROWS, Combination, combinations, stages
from lowres.recommend.confirming import choose, in_time, instead, wanted_length, whole_length
from lowres.recommend.ranking import Choice, Goal, front, needed

CHOSEN = "chosen by `lowres fit`."
"""Ends the first line of each recipe that is written, and tells such files from a user's own."""


def fit(
    model: str,
    task: str | None,
    device: Device,
    *,
    device_gib: float | None = None,
    host_gib: float | None = None,
    minutes: float | None = None,
    goal: Goal = "quality",
    evidence: Sequence[records.RunRecord] = (),
) -> Fit:
    """Search for the best recipe on a card.

    Args:
        model: As in a recipe; a folder with a config.json is enough.
        task: Of `lowres list tasks`; None for one that suits the model.
        host_gib: Resident memory that the process may take.
        minutes: Planned training time, where the data can be read and the card's rates are known.
        goal: `quality`: measured where there are records, else the fewest approximations; then
            speed. `speed`: tokens a second. `context`: the longest rows.
        evidence: Records to read qualities from.

    Raises:
        InputError: For a model, task or card that cannot be searched for.
    """
    started = time.monotonic()
    device = devices.stored(devices.beside_others(device))
    start = starting_recipe(model, task)
    start["budget"] = {
        key: value for key, value in (("device_gib", device_gib), ("host_gib", host_gib),
                                      ("minutes", minutes)) if value is not None
    }  # fmt: skip
    card = devices.card(device, device_gib)
    config = assumed.config_of(model)
    if kind_of(config) == "vision":
        text = f"'{model}' reads images, whose length is not to be chosen; use lowres plan"
        raise InputError("the model", [text])
    blocks = int(config.get_text_config().num_hidden_layers)
    most = LONG[-1] if goal == "context" else LENGTHS[-1]
    longest = longest_row(config, load_recipe(start), most)
    probe = _probe(config, longest)
    training, shapes = assumed.inputs_for(load_recipe(start, [f"loop.max_length={longest}"]))
    data = None if shapes.startswith("assumed") else training.data
    whole = max((n for n in LENGTHS + LONG if n <= longest), default=longest)
    if goal != "context":
        whole = min(whole, whole_length(None if data is None else data.train, longest))
    found: list[Choice] = []
    notes = [device.ignored] if device.ignored else []
    *_, last = stages()
    for stage in stages():
        weigh = functools.partial(_weigh, device, card, probe, longest, evidence, {})
        found += _search(combinations(start, blocks, stage), weigh, notes)
        room = card.offered_bytes - device.context_band_bytes
        if stage != last and not any(needed(c) <= room and c.length >= whole for c in found):
            continue
        if not found:
            raise InputError("the search", [*notes[:3], "no recipe of this model could be planned"])
        wanted = wanted_length(whole, found, notes)
        pool = [c for c in found if goal == "context" or c.length == wanted]
        if minutes is not None:
            pool = in_time(pool, data, minutes, notes)
        chosen, plan_ = choose(pool, device, card, goal, notes)
        if chosen is not None:
            break  # What the next stages bring in costs time and is not needed.
    if chosen is not None and chosen.length == LONG[-1]:
        notes.append(f"rows of more than {LONG[-1]} tokens are not searched")
    shown = front(found, wanted, goal)
    if chosen is not None and chosen not in shown:
        shown.append(chosen)
    shown.sort(key=needed)
    return Fit(
        model=model,
        task=start["task"]["name"],
        card=card,
        goal=goal,
        considered=len(found),
        candidates=[c.candidate for c in shown],
        chosen=None if chosen is None else shown.index(chosen),
        plan=plan_,
        recipe=None if chosen is None else _text(chosen, model, start["task"]["name"], card),
        seconds=time.monotonic() - started,
        instead=[] if chosen is not None else list(instead(found, pool, device, card)),
        notes=list(dict.fromkeys(notes)),
    )


def _search(
    tried: Iterable[Combination],
    weigh: Callable[[Combination], Iterator[Choice]],
    notes: list[str],
) -> list[Choice]:
    """All sizes of all combinations; what cannot be had is noted."""
    found: list[Choice] = []
    refused: set[tuple[str, Any]] = set()
    for combination in tried:
        if refused & set(combination.settings.items()):
            continue
        try:
            found += weigh(combination)
        except InputError as error:
            # Said of the part that cannot be had with this model, and not for each combination.
            where = error.problems[0].where.partition(".")[0]
            if where in ("model", "task"):
                raise
            told = combination.settings.get(where, combination.settings["levers"])
            refused.add((where if where in combination.settings else "levers", told))
            notes.append(f"left out: {told}: {error.problems[0].text}")
        except (LowresError, DoesNotRepeat) as error:
            told = "; ".join(f"{k} {v}" for k, v in combination.settings.items() if v != "none")
            notes.append(f"left out: {told}: {error}")
    return found


def longest_row(config: Any, recipe: Recipe, most: int = LENGTHS[-1]) -> int:
    """Tokens of the longest row that the model's positions allow, generated ones left aside; at
    most so many."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or most
    length = recipe.loop.max_length
    generated = recipe.objective.longest(recipe.task, length, kind_of(config)) - length
    return min(int(limit) - generated - recipe.method.positions(), most)


def _probe(config: Any, longest: int) -> int:
    """A length that shares no factor with any number of the configuration, if positions allow."""
    numbers: list[int] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list | tuple):
            for item in value:
                collect(item)
        elif type(value) is int:
            numbers.append(value)

    collect(config.to_dict())
    lengths = probe_lengths(numbers)
    return next((n for n in lengths if n <= longest - 8), lengths[-1])


def _weigh(
    device: Device,
    card: Card,
    probe: int,
    longest: int,
    evidence: Sequence[records.RunRecord],
    bases: dict[tuple[str, ...], tuple[ClosedForm, Trace]],
    combination: Combination,
) -> Iterator[Choice]:
    """All sizes of one combination from one trace.

    Args:
        probe: Length to trace at.
        bases: Forms made so far, by everything but the optimizer, of which another one changes only
            the states and the step.
    """
    sized = load_recipe(combination.raw, [f"loop.max_length={probe}", "loop.micro_batch_size=1"])
    inputs = assumed.assumed_inputs(sized)
    told = combination.settings
    key = (told["method"], told["levers"], told["freezing"])
    again = key in bases
    done = rehearse(sized, inputs, target_of(device), quick=True, states_only=again)
    trace = done.trace
    if again:
        form = bases[key][0].with_optimizer(bases[key][1], trace)
    else:
        form = ClosedForm.of(trace, probe)
        bases[key] = (form, trace)
    host_bytes = waiting_bytes(done)
    rates = rates_of(device)
    updates_rows = combination.recipe.loop.global_batch_size
    quality, basis = planned_quality.of(combination.recipe, evidence)
    for length in LENGTHS + LONG:
        if length > longest:
            continue
        for rows in ROWS:
            needs = form.peak_bytes(rows, length) + card.context_bytes
            seconds = tokens = None
            room_bytes = room_of(card, needs)
            if rates is not None:
                rates = dataclasses.replace(rates, pages=form.paged_bytes > room_bytes)
                seconds = form.step_seconds(rates, rows, length, updates_rows)
                tokens = updates_rows * length / seconds
            settings = combination.settings | {"rows": rows, "length": length}
            yield Choice(
                Candidate(
                    settings=settings,
                    needed_bytes=needs,
                    fits=room_bytes >= 0,
                    seconds=seconds,
                    tokens_per_second=tokens,
                    quality=quality,
                    quality_basis=basis,
                    lossy=list(combination.lossy),
                ),
                combination,
                rows,
                length,
                host_bytes,
            )


def _text(choice: Choice, model: str, task: str, card: Card) -> str:
    """The recipe as a file, with what chose it."""
    resolved = choice.combination.raw | {
        "loop": choice.combination.raw["loop"]
        | {"micro_batch_size": choice.rows, "max_length": choice.length}
    }
    head = (
        f"# {model} on {task} for {card.name}, {CHOSEN}\n"
        f"# Planned to need {choice.candidate.needed_bytes / GIB:.2f} GiB of device memory.\n"
    )
    return head + yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
