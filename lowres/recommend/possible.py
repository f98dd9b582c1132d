"""Which of the ranked methods a model refuses, and what fits a card: the least for all of them, a
plan for the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowres.core import registry
from lowres.core.errors import InputError, LowresError
from lowres.core.reading import load_recipe
from lowres.core.recipe import Recipe
from lowres.core.units import GIB, format_bytes
from lowres.memory import device as devices
from lowres.memory.allocator import smallest_capacity
from lowres.memory.catalogue import Device
from lowres.planning import assumed
from lowres.planning.least import least_bytes
from lowres.planning.plan import device_fits, target_of
from lowres.planning.rehearsal import rehearse_quickly
from lowres.recommend.fit import longest_row

if TYPE_CHECKING:
    from lowres.recommend.advice import Advice

PLANNED = 5
"""Methods that are planned: the first that may fit. A number and no time, so that the order is the
same on every machine."""
PLAIN: tuple[str, ...] = ()
CHECKPOINTED = ("gradient_checkpointing",)
FEW_BITS = ("gradient_checkpointing", "nf4_weights")

Levers = tuple[str, ...]


def fill_in(ranked: Sequence[Advice], start: dict[str, Any], config: Any, device: Device) -> None:
    """What is refused, the least that each method needs, and whether the first ones fit.

    Args:
        start: Keys of a recipe that the model takes.
        config: Of the model.

    Raises:
        InputError: When the card leaves nothing for tensors, or the model cannot be had.
    """
    card = devices.card(device, None)
    # What 4 bits save is the same beside every method that goes with them.
    saved = least_bytes(_recipe(start, PLAIN, config))
    saved -= least_bytes(_recipe(start, FEW_BITS, config))
    planned = 0
    for one in ranked:
        raw = start | {"method": {"name": one.method}}
        cls: Any = registry.load("method", one.method)
        try:
            plain = least_bytes(_recipe(raw, PLAIN, config)) + card.context_bytes
        except LowresError as error:
            _note(one, error)
            continue
        least = {PLAIN: plain, CHECKPOINTED: plain}
        if "nf4" in cls.few_bits():
            least[FEW_BITS] = plain - saved
        one.levers, one.at_least_bytes = list(least.items())[-1]
        may = [levers for levers, needed in least.items() if device_fits(needed, card)]
        if not may:
            one.fits = False
        elif one.score is not None and planned < PLANNED:
            planned += 1
            _plan(one, raw, may, config, device)
        else:
            of = f"--model {start['model']['checkpoint']} --device-gib {device.total_bytes / GIB:g}"
            one.unknown.append(f"whether it fits: lowres plan {of} --set method={one.method}")


def _plan(
    one: Advice, raw: dict[str, Any], may: Sequence[Levers], config: Any, device: Device
) -> None:
    """With as few levers as will do."""
    card = devices.card(device, None)
    for levers in may:
        try:
            recipe = _recipe(raw, levers, config)
            done = rehearse_quickly(recipe, assumed.assumed_inputs(recipe), target_of(device))
        except LowresError as error:
            if one.needed_bytes is None:
                _note(one, error)
            return
        peak_bytes = smallest_capacity(done.trace.tensors, done.trace.sizes)
        one.levers, one.needed_bytes = levers, peak_bytes + card.context_bytes
        one.fits = device_fits(one.needed_bytes, card)
        if one.fits:
            return


def _note(one: Advice, error: LowresError) -> None:
    if isinstance(error, InputError):
        one.refused, one.fits = error.problems[0].text, False
    else:
        one.unknown.append(f"whether it fits: {error}")


def _recipe(raw: dict[str, Any], levers: Levers, config: Any) -> Recipe:
    """Its rows as long as the model's positions and the method allow."""
    raw = raw | {"levers": [{"name": name} for name in levers]}
    # Two updates: there are methods that act between them.
    loop = raw["loop"] | {"epochs": 2}
    longest = longest_row(config, load_recipe(raw | {"loop": loop}))
    return load_recipe(raw | {"loop": loop | {"max_length": min(loop["max_length"], longest)}})


def told(one: Advice) -> str:
    """Whether it fits, and whether that was planned, in words."""
    if one.refused is not None:
        return f"refused: {one.refused}"
    levers = f" with {' + '.join(one.levers)}" if one.levers else ""
    if one.needed_bytes is not None:
        verdict = "fits" if one.fits else "does not fit"
        return f"{verdict}, planned: {format_bytes(one.needed_bytes)}{levers}"
    if one.at_least_bytes is None:
        return "not planned"
    verdict = "does not fit" if one.fits is False else "not planned"
    return f"{verdict}: at least {format_bytes(one.at_least_bytes)}{levers}"
