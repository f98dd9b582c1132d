"""What is the best that fits? A search over recipes with a closed form for each combination."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from lowres.bridges.transformers import kind_of
from lowres.core import record as records
from lowres.core.errors import InputError, LowresError
from lowres.core.plan import Candidate, Card, Change, Fit, MemoryPlan
from lowres.core.reading import load_recipe
from lowres.core.recipe import Recipe
from lowres.core.units import GIB
from lowres.memory import device as devices
from lowres.memory.catalogue import Device
from lowres.memory.closed_form import LENGTHS as PROBES
from lowres.memory.closed_form import ClosedForm
from lowres.memory.extend import DoesNotRepeat
from lowres.memory.trace import Trace
from lowres.run import assumed, planned_quality
from lowres.run.combinations import LENGTHS, ROWS, Combination, combinations
from lowres.run.plan import plan, rates_of, target_of
from lowres.run.ranking import Choice, Goal, front, needed, rank
from lowres.run.rehearsal import rehearse
from lowres.run.starting import starting_recipe

WANTED_LENGTH = 512
"""Where the data are not at hand: rows of this length are to fit, if any do."""
TRIES = 6
"""Candidates that are planned in full before the search gives up on a combination's promise."""


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
    start = starting_recipe(model, task)
    start["budget"] = {
        key: value for key, value in (("device_gib", device_gib), ("host_gib", host_gib),
                                      ("minutes", minutes)) if value is not None
    }  # fmt: skip
    card = devices.card(device, device_gib)
    config = assumed.config_of(model)
    blocks = int(config.get_text_config().num_hidden_layers)
    longest = _longest(config, load_recipe(start))
    found: list[Choice] = []
    notes: list[str] = []
    refused: set[str] = set()
    bases: dict[tuple[str, ...], tuple[ClosedForm, Trace]] = {}
    for combination in combinations(start, blocks):
        parts = (combination.settings["method"], combination.settings["optimizer"])
        if refused & set(parts):
            continue
        try:
            found += _weigh(combination, device, card, longest, evidence, bases)
        except InputError as error:
            # Said of the part that cannot be had with this model, and not for each combination.
            where = error.problems[0].where.partition(".")[0]
            part = parts[1] if where == "optimizer" else parts[0]
            refused.add(part)
            notes.append(f"left out: {part}: {error.problems[0].text}")
        except (LowresError, DoesNotRepeat) as error:
            told = "; ".join(f"{k} {v}" for k, v in combination.settings.items() if v != "none")
            notes.append(f"left out: {told}: {error}")
    if not found:
        raise InputError("the search", [*notes[:3], "no recipe of this model could be planned"])
    wanted = _wanted_length(start, longest, found, notes)
    chosen, plan_ = _choose(found, device, card, goal, wanted, notes)
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
        instead=[] if chosen is not None else list(_instead(found, card, wanted)),
        notes=notes,
    )


def _longest(config: Any, recipe: Recipe) -> int:
    """Tokens of the longest row that the model's positions allow, generated ones left aside."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or LENGTHS[-1]
    length = recipe.loop.max_length
    generated = recipe.objective.longest(recipe.task, length, kind_of(config)) - length
    return min(int(limit) - generated, LENGTHS[-1])


def _weigh(
    combination: Combination,
    device: Device,
    card: Card,
    longest: int,
    evidence: Sequence[records.RunRecord],
    bases: dict[tuple[str, ...], tuple[ClosedForm, Trace]],
) -> Iterator[Choice]:
    """All sizes of one combination from one trace.

    Args:
        bases: Forms made so far, by everything but the optimizer, of which another one changes only
            the states and the step.
    """
    probe = next((n for n in PROBES if n <= longest - 8), PROBES[-1])
    sized = load_recipe(combination.raw, [f"loop.max_length={probe}", "loop.micro_batch_size=1"])
    inputs = assumed.assumed_inputs(sized)
    told = combination.settings
    key = (told["method"], told["levers"], told["freezing"])
    again = key in bases
    trace = rehearse(sized, inputs, target_of(device), quick=True, states_only=again).trace
    if again:
        form = bases[key][0].with_optimizer(bases[key][1], trace)
    else:
        form = ClosedForm.of(trace, probe)
        bases[key] = (form, trace)
    rates = rates_of(device)
    updates_rows = combination.recipe.loop.global_batch_size
    quality, basis = planned_quality.of(combination.recipe, evidence)
    for length in LENGTHS:
        if length > longest:
            continue
        for rows in ROWS:
            needs = form.peak_bytes(rows, length) + card.context_bytes
            seconds = tokens = None
            if rates is not None:
                seconds = form.step_seconds(rates, rows, length, updates_rows)
                tokens = updates_rows * length / seconds
            settings = combination.settings | {"rows": rows, "length": length}
            yield Choice(
                Candidate(
                    settings=settings,
                    needed_bytes=needs,
                    fits=needs - card.context_bytes <= card.available_bytes,
                    seconds=seconds,
                    tokens_per_second=tokens,
                    quality=quality,
                    quality_basis=basis,
                    lossy=list(combination.lossy),
                ),
                combination,
                rows,
                length,
            )


def _wanted_length(
    start: dict[str, Any], longest: int, found: Sequence[Choice], notes: list[str]
) -> int:
    """The shortest length that loses no row, or the longest below it that fits at all."""
    recipe = load_recipe(start, [f"loop.max_length={longest}"])
    inputs, shapes = assumed.inputs_for(recipe)
    wanted = min(WANTED_LENGTH, longest)
    if not shapes.startswith("assumed"):
        wanted = max(row.length for row in inputs.data.train)
    wanted = next((n for n in LENGTHS if n >= wanted), longest)
    fitting = sorted({c.length for c in found if c.candidate.fits and c.length <= wanted})
    if fitting and fitting[-1] < wanted:
        notes.append(
            f"rows of {wanted} tokens fit with nothing; the longest that do: {fitting[-1]}"
        )
        return fitting[-1]
    return min(wanted, max(c.length for c in found))


def _choose(
    found: Sequence[Choice],
    device: Device,
    card: Card,
    goal: Goal,
    wanted: int,
    notes: list[str],
) -> tuple[Choice | None, MemoryPlan | None]:
    """The best by the closed form that the full plan confirms."""
    fitting = [c for c in found if c.candidate.fits]
    if goal != "context":
        fitting = [c for c in fitting if c.length == wanted]
    for tried, choice in enumerate(sorted(fitting, key=lambda c: rank(c, goal))):
        if tried == TRIES:
            break
        confirmed = plan(_recipe(choice), device)
        choice.candidate.needed_bytes = confirmed.needed_bytes
        # A recommendation must hold at the top of the band, too.
        sure = (
            confirmed.needed_bytes + confirmed.band_bytes
            <= card.available_bytes + card.context_bytes
        )
        if sure and confirmed.fits is not False and confirmed.host_fits is not False:
            return choice, confirmed
        choice.candidate.fits = False
        told = ", ".join(str(v) for v in choice.candidate.settings.values())
        notes.append(f"too close: planned in full it leaves less than its band: {told}")
    return None, None


def _recipe(choice: Choice) -> Any:
    return load_recipe(
        choice.combination.raw,
        [f"loop.max_length={choice.length}", f"loop.micro_batch_size={choice.rows}"],
    )


def _text(choice: Choice, model: str, task: str, card: Card) -> str:
    """The recipe as a file, with what chose it."""
    resolved = choice.combination.raw | {
        "loop": choice.combination.raw["loop"]
        | {"micro_batch_size": choice.rows, "max_length": choice.length}
    }
    head = (
        f"# {model} on {task} for {card.name}, chosen by `lowres fit`.\n"
        f"# Planned to need {choice.candidate.needed_bytes / GIB:.2f} GiB of device memory.\n"
    )
    return head + yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)


def _instead(found: Sequence[Choice], card: Card, wanted: int) -> Iterator[Change]:
    """What would fit where nothing does: a shorter row, a larger card, a smaller model."""
    least = min(found, key=lambda c: c.candidate.needed_bytes)
    needs = least.candidate.needed_bytes
    told = ", ".join(f"{v}" for v in least.candidate.settings.values())
    yield Change(
        f"a card with {needs / GIB:.1f} GiB or more for lowres ({told})", [], needed_bytes=needs
    )
    at = [c for c in found if c.length == wanted]
    if at:
        there = min(at, key=lambda c: c.candidate.needed_bytes).candidate.needed_bytes
        yield Change(
            f"for rows of {wanted} tokens a card with {there / GIB:.1f} GiB", [],
            needed_bytes=there,
        )  # fmt: skip
    share = card.available_bytes / max(1, needs - card.context_bytes)
    yield Change(
        f"a model of at most {share:.0%} of this one's size, with the same choices", [],
        needed_bytes=card.available_bytes + card.context_bytes,
    )  # fmt: skip
