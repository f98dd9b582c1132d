"""The plan before the run: refuse what cannot fit while nothing is loaded yet."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import psutil

from lowres.bridges import accelerate
from lowres.core.errors import DoesNotFit, LowresError, NotPlanned
from lowres.core.plan import MemoryPlan, to_dict
from lowres.core.recipe import Recipe
from lowres.core.units import GIB, format_bytes, format_seconds
from lowres.making.build import Inputs
from lowres.memory import device as devices
from lowres.memory.catalogue import Device
from lowres.planning.ladder import ladder
from lowres.planning.plan import host_limit, plan
from lowres.run.progress import Reporter


def foresee(
    recipe: Recipe, inputs: Inputs, accelerator: Any, reporter: Reporter, force: bool
) -> tuple[MemoryPlan | None, str | None]:
    """Plan on the main process and stop every process when it does not fit.

    Returns:
        The plan, None on the other processes; and why there is none, where the recipe cannot be
        traced.

    Raises:
        DoesNotFit: Unless forced.
    """
    told: list[Any] = [None]
    found = remark = None
    if accelerator.is_main_process:
        device = devices.beside_others(devices.of_torch(accelerator.device))
        own_bytes = int(psutil.Process().memory_info().rss)
        try:
            processes = accelerator.num_processes
            found = plan(recipe, device, inputs=inputs, processes=processes)
        except NotPlanned as error:
            remark = f"no plan: {error}"
        except LowresError as error:
            told[0] = error
        else:
            reporter.say(verdict(found))
            fits = found.fits is not False and found.host_fits is not False
            if not fits and not force:
                told[0] = _refuse(recipe, device, found, own_bytes, reporter)
    (problem,) = accelerate.from_main_process(accelerator, told)
    if problem is not None:
        raise problem
    return found, remark


def _refuse(
    recipe: Recipe, device: Device, found: MemoryPlan, own_bytes: int, reporter: Reporter
) -> DoesNotFit:
    """Weigh what would help, unless nothing can: not even the process as it is has room."""
    limit = host_limit(recipe, device, found.processes)
    if limit is not None and own_bytes > limit[0]:
        enough = math.ceil(found.host_needed_bytes / GIB * 100) / 100
        return DoesNotFit(
            f"{_short_of(found, limit)}; nothing was loaded. No change to the recipe helps: with "
            f"nothing loaded this process holds {format_bytes(own_bytes)}; raise budget.host_gib "
            f"to {enough:g} (--force runs it nevertheless)"
        )
    reporter.say("does not fit; weighing changes to the recipe, each by a plan of its own")
    found.changes = ladder(recipe, device, found)
    return DoesNotFit(refusal(found, limit))


def verdict(found: MemoryPlan) -> str:
    """The plan in one line."""
    peak = found.peak
    made = ", ".join(
        f"{name} {format_bytes(size)}"
        for name, size in sorted(peak.categories.items(), key=lambda item: -item[1])[:3]
    )
    device = format_bytes(found.needed_bytes)
    step = "" if found.step is None else f", about {format_seconds(found.step.seconds)} an update"
    return f"plan: {device} at most ({found.peak_phase}: {made}){step}"


def refusal(found: MemoryPlan, limit: tuple[int, str] | None) -> str:
    """Why it cannot fit, and what would make it fit, cheapest first.

    Args:
        limit: Of host memory, by `plan.host_limit`.
    """
    lines = [
        f"\n  - {change.name}: {format_bytes(change.needed_bytes)} "
        f"(--set '{' '.join(change.overrides)}')"
        for change in found.changes
        if change.fits
    ]
    end = "".join(lines) or "\n  no single change is enough; `lowres fit` searches for several"
    return (
        f"{_short_of(found, limit)}; nothing was loaded. "
        f"Its peak is in {found.peak_phase}, {found.peak.instant}. "
        f"What would make it fit, cheapest first:{end}\n  (--force runs it nevertheless)"
    )


def _short_of(found: MemoryPlan, limit: tuple[int, str] | None) -> str:
    """What is needed and what there is, of each memory that is too small."""
    card, short = found.card, []
    if found.fits is False and card is not None:
        offered = format_bytes(card.offered_bytes)
        needed = format_bytes(found.needed_bytes)
        short.append(f"the plan needs {needed} of device memory, {card.name} offers {offered}")
    if found.host_fits is False and limit is not None:
        needed = format_bytes(found.host_needed_bytes)
        short.append(f"the plan needs {needed} of host memory, {limit[1]} {format_bytes(limit[0])}")
    return "; ".join(short)


def to_record(found: MemoryPlan) -> dict[str, Any]:
    """The plan as it stands in the record, without what the record says elsewhere."""
    slim = to_dict(dataclasses.replace(found, curve=None, recipe={}))
    del slim["recipe"], slim["curve"]
    return slim
