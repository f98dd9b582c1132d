"""What a recipe will cost: its rehearsal, replayed through the allocator of the card."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from typing import Any

import psutil
import torch

from lowres.bridges import rehearsal
from lowres.bridges.kinds import vocabulary_of
from lowres.core.errors import InputError
from lowres.core.plan import Card, MemoryPlan, PhasePlan, PlanPhase, StepPlan
from lowres.core.recipe import Recipe
from lowres.core.units import gib_to_bytes
from lowres.making.build import Inputs
from lowres.memory import device as devices
from lowres.memory.allocator import CachingAllocator, smallest_capacity
from lowres.memory.catalogue import Device
from lowres.memory.extend import DoesNotRepeat
from lowres.memory.host_allocator import disk_bytes, given_bytes
from lowres.memory.roofline import DATASHEET, MEASURED, Rates, paged_bytes, step_time
from lowres.memory.summary import Summary
from lowres.memory.trace import Trace
from lowres.memory.translate import Target
from lowres.planning.assumed import inputs_for
from lowres.planning.rehearsal import Rehearsal, rehearse


def plan(
    recipe: Recipe,
    device: Device | None = None,
    *,
    exact: bool = False,
    inputs: Inputs | None = None,
    processes: int = 1,
) -> MemoryPlan:
    """Plan a recipe from its configuration alone; reads no weights and needs no GPU.

    Args:
        device: The card; None for the one that `budget.device_gib` describes, then the one of this
            machine. `memory.device` finds cards by name and size.
        exact: Trace every block instead of extending from a few of a kind.
        inputs: Of `build.read`, where they were read already.
        processes: That share each update; the plan is of one of them.

    Returns:
        The plan. Where it fits no card is told by `fits`, not by an error.

    Raises:
        InputError: For a recipe, configuration or card that cannot be planned.
        TraceFailed: Where the recipe's code cannot run without data, naming the operation.
    """
    started = time.monotonic()
    device, card = choose_card(recipe, device)
    shapes = "the data of the run"
    try:
        if inputs is None:
            inputs, shapes = inputs_for(recipe)
    except InputError as error:
        raise recipe.located(error) from error
    target = target_of(device)
    notes = [device.ignored] if device is not None and device.ignored else []
    try:
        done = rehearse(recipe, inputs, target, whole=exact, processes=processes)
    except DoesNotRepeat as why:
        notes.append(f"the whole depth was traced: {why}")
        done, exact = rehearse(recipe, inputs, target, whole=True, processes=processes), True
    vocabulary = vocabulary_of(inputs.config)
    summary = Summary(done.trace, done.names, vocabulary)
    phases = _phases(done, summary, target, vocabulary)
    peak_phase = max(phases, key=lambda p: phases[p].allocated_bytes or phases[p].live_bytes)
    unknown = {**done.load.unknown, **done.trace.unknown}
    needed_bytes = phases[peak_phase].live_bytes
    if target.kind == "cuda":
        needed_bytes = smallest_capacity(done.trace.tensors, done.trace.sizes)
        if done.loads_on_device:
            load, _ = done.load.apart()
            loading = smallest_capacity(load.tensors, load.sizes)
            needed_bytes = max(needed_bytes, loading)
        needed_bytes += card.context_bytes if card else 0
    # On a CPU the device's memory is the host's.
    own = (p.live_bytes if target.kind == "cpu" else 0 for p in phases.values())
    host_bytes = max(map(sum, zip(own, (p.host_bytes for p in phases.values()), strict=True)))
    # Read after the rehearsal: by now all is imported that a run of the recipe imports.
    host_bytes += psutil.Process().memory_info().rss
    return MemoryPlan(
        recipe=recipe.resolved(),
        digest=recipe.digest,
        card=card,
        phases=phases,
        peak_phase=peak_phase,
        needed_bytes=needed_bytes,
        fits=None if card is None or card.kind == "cpu" else device_fits(needed_bytes, card),
        host_needed_bytes=host_bytes,
        host_fits=host_fits(recipe, host_bytes, device, processes),
        processes=processes,
        updates=done.updates,
        disk_bytes=disk_bytes(done.host),
        trainable=done.trainable,
        total=done.total,
        step=step_of(device, done, None if card is None else room_of(card, needed_bytes)),
        curve=summary.curve(*summary.bounds["steady_steps"]),
        shapes=shapes,
        depth=_depth(done, exact),
        band_bytes=sum(unknown.values()) + (device.context_band_bytes if device else 0),
        blocks=[run.length for run in done.runs],
        planning_seconds=time.monotonic() - started,
        unknown=sorted(unknown),
        notes=notes,
        versions={"torch": torch.__version__, **rehearsal.versions()},
    )


def choose_card(recipe: Recipe, device: Device | None) -> tuple[Device | None, Card | None]:
    """The device to plan for, and what of it the budget leaves."""
    budget = recipe.budget.device_gib
    if device is None:
        here = devices.present()
        device = None if here is None else devices.beside_others(here)
        if device is None and budget is not None:
            device = devices.generic(budget)
        if device is None:
            return None, None
    device = devices.stored(device)
    return device, devices.card(device, None if device.kind == "cpu" else budget)


def target_of(device: Device | None) -> Target:
    """Whose behaviour to trace. Without a device: CUDA, as of a card before Hopper."""
    if device is None:
        return Target("cuda")
    if device.kind == "cpu":
        return Target("cpu")
    capability = device.compute_capability or (8, 6)
    workspace = device.matmul_workspace_bytes or devices.workspace_bytes(capability)
    return Target("cuda", workspace, flash=capability >= (8, 0))


def device_fits(needed_bytes: int, card: Card) -> bool:
    """Whether a card offers that much, its context included."""
    return room_of(card, needed_bytes) >= 0


def room_of(card: Card, needed_bytes: int) -> int:
    """What is left of a card beside so much, its context included."""
    return card.available_bytes - (needed_bytes - card.context_bytes)


def host_fits(
    recipe: Recipe, needed_bytes: int, device: Device | None, processes: int = 1
) -> bool | None:
    """Whether the host has that much for each process, or may give it; None where neither is
    known."""
    limit = host_limit(recipe, device, processes)
    return None if limit is None else needed_bytes <= limit[0]


def host_limit(recipe: Recipe, device: Device | None, processes: int = 1) -> tuple[int, str] | None:
    """Bytes of host memory that there are for one process to take, and the words before them that
    say whose limit that is; None where it is not known."""
    budget = recipe.budget.host_gib
    if budget is not None:
        return gib_to_bytes(budget), f"budget.host_gib {budget:g} allows"
    if device is not None and (device.kind == "cpu" or device.uuid is not None):  # of this machine
        total = int(psutil.virtual_memory().total)
        here = min(processes, int(os.environ.get("LOCAL_WORLD_SIZE", processes)))  # by launchers
        shared = f" for each of {here} processes" if here > 1 else ""
        return total // here, f"this machine has{shared}"
    return None


def waiting_bytes(done: Rehearsal) -> int:
    """Host memory that a rehearsal takes at the least: what waits there while it trains, or the
    weights that are read there first, and what the process holds by now."""
    first = next(at for name, at in done.trace.marks if name == "first_step")
    read = 0 if done.loads_on_device else sum(done.trace.sizes[:first])
    return int(max(read, *given_bytes(done.host)) + psutil.Process().memory_info().rss)


def _depth(done: Rehearsal, exact: bool) -> str:
    if exact or all(len(r.kept) == r.length for r in done.runs):
        return f"all {len(done.names)} blocks traced"
    told = " and ".join(f"{len(r.kept)} of {r.length}" for r in done.runs)
    return f"extended from {told} blocks"


def _phases(
    done: Rehearsal, summary: Summary, target: Target, vocabulary: int
) -> dict[PlanPhase, PhasePlan]:
    phases: dict[PlanPhase, PhasePlan] = {}
    on_device = target.kind == "cpu" or done.loads_on_device
    # What is loaded to the host and moved afterwards is all in host memory while it is loaded.
    load, load_host = done.load.apart() if on_device else (done.load, Trace())
    loading, loading_bytes = Summary(load, (), vocabulary), max(given_bytes(load_host))
    peak = loading.peak(0, len(load.tensors))
    first = summary.bounds["first_step"][0]
    held = summary.peak(0, first)
    chosen = peak if on_device else held
    phases["load"] = PhasePlan(
        live_bytes=chosen.live_bytes, allocated_bytes=None, reserved_bytes=None,
        host_bytes=loading_bytes if target.kind == "cpu"
        else done.largest_bytes + loading_bytes if on_device else peak.live_bytes,
        categories=held.categories if not on_device else {"weights": peak.live_bytes},
        instant="loading" if on_device else "weights on the device",
        module=chosen.module, operation=chosen.operation,
    )  # fmt: skip
    given = given_bytes(done.host)
    host_marks = [at for _, at in done.host.marks]
    waits = {
        name: max(given[begin : end + 1])
        for (name, begin), end in zip(done.host.marks, host_marks[1:], strict=False)
    }
    for name in ("first_step", "steady_steps", "save", "evaluate", "resume"):
        begin, end = summary.bounds[name]
        peak = summary.peak(begin, end)
        phases[name] = PhasePlan(
            live_bytes=peak.live_bytes, allocated_bytes=None, reserved_bytes=None,
            host_bytes=waits[name], categories=peak.categories, instant=peak.instant,
            module=peak.module, operation=peak.operation,
        )  # fmt: skip
    if target.kind == "cuda":
        if done.loads_on_device:
            _replay(phases, {"load": (0, len(load.tensors))}, load)
        bounds = {"load": (0, first)} if not done.loads_on_device else {}
        _replay(phases, bounds | summary.bounds, done.trace)
    return phases


def _replay(phases: dict[PlanPhase, PhasePlan], bounds: dict[str, Any], trace: Any) -> None:
    """Fill in what the allocator would hand out and take from the driver, phase after phase."""
    allocator = CachingAllocator()
    at = 0
    for name, (begin, end) in sorted(bounds.items(), key=lambda item: item[1]):
        for tensor, size in zip(trace.tensors[at:begin], trace.sizes[at:begin], strict=True):
            allocator.malloc(tensor, size) if size > 0 else allocator.free(tensor)
        allocator.peak_allocated_bytes = allocator.allocated_bytes
        allocator.peak_reserved_bytes = allocator.reserved_bytes
        for tensor, size in zip(trace.tensors[begin:end], trace.sizes[begin:end], strict=True):
            allocator.malloc(tensor, size) if size > 0 else allocator.free(tensor)
        at = end
        phase = phases.get(name)  # type: ignore[call-overload]
        if phase is not None:
            phase.allocated_bytes = allocator.peak_allocated_bytes
            phase.reserved_bytes = allocator.peak_reserved_bytes


def rates_of(device: Device) -> Rates | None:
    """What the planner assumes a device to reach; None where its file knows no rates."""
    basis = "measured on this device" if device.calibrated else "datasheet rates"
    if not device.rates or not device.bandwidth_bytes_per_second:
        like = devices.slowest_of_size(device.total_bytes)
        if like is None or device.kind != "cuda":
            return None
        device, basis = like, f"datasheet rates of the {like.name}, the slowest of this size"
    assert device.rates and device.bandwidth_bytes_per_second
    shares: dict[str, Any] = MEASURED if device.calibrated else DATASHEET
    return Rates(
        flops={str(name): rate for name, rate in device.rates.items()},
        bandwidth=device.bandwidth_bytes_per_second,
        transfer=device.pcie_bytes_per_second or device.bandwidth_bytes_per_second,
        launch_seconds=device.launch_seconds or 0.0,
        basis=basis,
        **shares,
    )


def step_of(device: Device | None, done: Rehearsal, room_bytes: int | None) -> StepPlan | None:
    """Args: room_bytes: What of the device is left, for pages to stay in; None is not known."""
    rates = rates_of(device) if device is not None else None
    if rates is None:
        return None
    if room_bytes is not None:
        paged = paged_bytes((cost, 1) for cost in done.trace.costs)
        rates = dataclasses.replace(rates, pages=paged > room_bytes)
    return step_time(done.trace, rates, done.passes, done.repeats, done.tokens)


def with_budget(recipe: Recipe, device_gib: float | None) -> Recipe:
    """The recipe under another device budget. Raises InputError where that is no size."""
    if device_gib is None:
        return recipe
    if not (math.isfinite(device_gib) and device_gib > 0):
        text = f"{device_gib:g} is no size of a card; give GiB, such as 8"
        raise InputError("--device-gib", [text])
    budget = dataclasses.replace(recipe.budget, device_gib=device_gib)
    return dataclasses.replace(recipe, budget=budget)
