"""What single changes to a recipe would save and cost: the lever ladder of a plan."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

from lowres.core import registry
from lowres.core.errors import InputError, LowresError
from lowres.core.parts import Part, values
from lowres.core.plan import Card, Change, MemoryPlan, StepPlan
from lowres.core.reading import load_recipe
from lowres.core.recipe import Recipe
from lowres.memory.allocator import smallest_capacity
from lowres.memory.catalogue import Device
from lowres.memory.host_allocator import given_bytes
from lowres.planning import plan as planning
from lowres.planning.assumed import inputs_for
from lowres.planning.rehearsal import Rehearsal, rehearse_quickly

_STEPS = ("first_step", "steady_steps")
_LOST = 0.01
"""Between the plan and the quick rehearsal of one recipe, over what is needed."""


@dataclasses.dataclass(frozen=True)
class Weighed:
    """What a quick rehearsal says of a recipe; host memory is what levers keep there."""

    needed_bytes: int
    host_bytes: int
    step: StepPlan | None


def ladder(
    recipe: Recipe, device: Device | None, found: MemoryPlan, only: str = ""
) -> list[Change]:
    """Each lever that the recipe lacks and each smaller setting, by itself.

    Args:
        found: The recipe's own plan.
        only: Of the changes the one of that name.

    Returns:
        Those that make it fit first, and of these the least costly in time; then by bytes saved;
        last what cannot be had, with the reason.
    """
    device, card = planning.choose_card(recipe, device)
    scale = _Scale(device, card, found, weigh(recipe, device, card, found.processes))
    changes = []
    for name, overrides in variants(recipe, found):
        if only not in ("", name):
            continue
        change = Change(name, overrides)
        changes.append(change)
        try:
            changed = load_recipe(recipe.resolved(), overrides)
            scale.put(change, changed)
        except InputError as error:
            change.problem = "; ".join(p.text for p in error.problems)
            continue
        except LowresError as error:
            change.problem = str(error)
    return sorted(changes, key=_order)


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Weighs changes to a recipe whose plan is `found` and whose quick rehearsal gave `base`."""

    device: Device | None
    card: Card | None
    found: MemoryPlan
    base: Weighed

    def put(self, change: Change, changed: Recipe) -> None:
        """Fill in what the change would do."""
        there = weigh(changed, self.device, self.card, self.found.processes)
        if self.base.step is not None and there.step is not None:
            change.step_ratio = there.step.seconds / self.base.step.seconds
        saved = self.base.needed_bytes - there.needed_bytes
        host = self.found.host_needed_bytes + there.host_bytes - self.base.host_bytes
        # On a CPU the device's memory is the host's.
        own = saved if self.card is not None and self.card.kind == "cpu" else 0
        self._tell(change, changed, saved, host - own)
        if self._doubtful(change):
            full = planning.plan(changed, self.device, processes=self.found.processes)
            saved = self.found.needed_bytes - full.needed_bytes
            self._tell(change, changed, saved, full.host_needed_bytes)

    def _tell(self, change: Change, changed: Recipe, saved: int, host: int) -> None:
        change.saved_bytes, change.needed_bytes = saved, self.found.needed_bytes - saved
        if self.card is None:
            return
        processes = self.found.processes
        there = planning.host_fits(changed, host, self.device, processes) is not False
        change.fits = there and (
            self.card.kind == "cpu" or planning.device_fits(change.needed_bytes, self.card)
        )

    def _doubtful(self, change: Change) -> bool:
        """The quick rehearsal sees the steps alone, and a promise to fit must be kept."""
        assert change.needed_bytes is not None
        found = self.found
        context = self.card.context_bytes if self.card is not None else 0
        elsewhere = max(p.allocated_bytes or p.live_bytes
                        for name, p in found.phases.items() if name not in _STEPS)  # fmt: skip
        refused = found.fits is False or found.host_fits is False
        # What levers keep on the host need not be held when the host holds most.
        by_host = (
            change.fits is False
            and self.card is not None
            and self.card.kind != "cpu"
            and planning.device_fits(change.needed_bytes, self.card)
        )
        # Room lost between tensors differs from layout to layout: no difference tells it.
        lost = abs(found.needed_bytes - self.base.needed_bytes)
        return (
            found.peak_phase not in _STEPS
            or by_host
            or lost > found.needed_bytes * _LOST
            or change.needed_bytes <= elsewhere + context
            or (refused and (change.fits is True or found.fits is not False))
        )


def _order(change: Change) -> tuple[bool, bool, float]:
    if change.problem is not None:
        return (True, True, 0.0)
    if change.fits:
        return (False, False, change.step_ratio or -float(change.saved_bytes or 0))
    return (False, True, -float(change.saved_bytes or 0))


def variants(recipe: Recipe, found: MemoryPlan) -> Iterator[tuple[str, list[str]]]:
    """Names of the changes to try, with their `--set` arguments."""
    present = [lever.name for lever in recipe.levers]
    resolved = recipe.resolved()
    for name in registry.names("lever"):
        if name not in present:
            told = ", ".join([*(_short(lever) for lever in recipe.levers), name])
            yield f"lever {name}", [f"levers=[{told}]"]
    loop = recipe.loop
    if loop.micro_batch_size > 1:
        half = _divisor_below(loop.global_batch_size, loop.micro_batch_size // 2)
        yield f"micro-batch {half}", [f"loop.micro_batch_size={half}"]
    if loop.max_length >= 64:
        half = loop.max_length // 2
        yield f"length {half}", [f"loop.max_length={half}"]
    if recipe.optimizer.name == "adamw" and "adamw_8bit" in registry.names("optimizer"):
        lr = resolved["optimizer"]["lr"]
        told = json.dumps({"name": "adamw_8bit", "lr": lr})
        yield "optimizer adamw_8bit", [f"optimizer={told}"]
    if recipe.method.trains_weights:
        yield "method lora", ['method={"name": "lora", "targets": "all-linear"}']
    if recipe.model.dtype == "float32":
        yield "weights in bfloat16", ["model.dtype=bfloat16"]
    blocks = sum(found.blocks)
    if recipe.freezing.name == "none" and blocks > 1:
        told = json.dumps({"name": "prefix", "frozen": blocks // 2})
        yield f"freeze the lower {blocks // 2} of {blocks} blocks", [f"freezing={told}"]


def _short(part: Part) -> str:
    """A part as `--set` takes it: its name, with the fields that are not as they are by default."""
    try:
        usual = values(type(part)())
    except TypeError:
        usual = {}
    changed = {k: v for k, v in values(part).items() if usual.get(k) != v}
    return json.dumps({"name": part.name, **changed}) if changed else part.name


def _divisor_below(whole: int, most: int) -> int:
    return next(n for n in range(most, 0, -1) if whole % n == 0)


def weigh(recipe: Recipe, device: Device | None, card: Card | None, processes: int = 1) -> Weighed:
    """Needed bytes and step time by a quick rehearsal; both are for comparison."""
    inputs, _ = inputs_for(recipe)
    target = planning.target_of(device)
    done = rehearse_quickly(recipe, inputs, target, processes)
    needed_bytes = _needed(done, card, target.kind == "cpu")
    room_bytes = None if card is None else planning.room_of(card, needed_bytes)
    step = planning.step_of(device, done, room_bytes)
    return Weighed(needed_bytes, max(given_bytes(done.host)), step)


def _needed(done: Rehearsal, card: Card | None, on_cpu: bool) -> int:
    if on_cpu:
        live = peak = 0
        for size in done.trace.sizes:
            live += size
            peak = max(peak, live)
        return peak
    context = card.context_bytes if card is not None else 0
    return smallest_capacity(done.trace.tensors, done.trace.sizes) + context
