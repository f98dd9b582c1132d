"""The plan before the run: refuse what cannot fit while nothing is loaded yet."""

from __future__ import annotations

import dataclasses
from typing import Any

from lowres.bridges import accelerate
from lowres.core.errors import DoesNotFit, LowresError, NotPlanned
from lowres.core.plan import MemoryPlan, to_dict
from lowres.core.recipe import Recipe
from lowres.core.units import format_bytes, format_seconds
from lowres.memory import device as devices
from lowres.run.build import Inputs
from lowres.run.ladder import ladder
from lowres.run.plan import plan
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
        device = devices.of_torch(accelerator.device)
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
                found.changes = ladder(recipe, device, found)
                told[0] = DoesNotFit(refusal(found))
    (problem,) = accelerate.from_main_process(accelerator, told)
    if problem is not None:
        raise problem
    return found, remark


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


def refusal(found: MemoryPlan) -> str:
    """Why it cannot fit, and what would make it fit, cheapest first."""
    card = found.card
    if found.fits is False and card is not None:
        why = (
            f"the plan needs {format_bytes(found.needed_bytes)} of device memory, "
            f"{card.name} offers {format_bytes(card.available_bytes + card.context_bytes)}"
        )
    else:
        why = (
            f"the plan needs {format_bytes(found.host_needed_bytes)} of host memory, more than "
            "there is or than budget.host_gib allows"
        )
    lines = [
        f"\n  - {change.name}: {format_bytes(change.needed_bytes)} "
        f"(--set '{' '.join(change.overrides)}')"
        for change in found.changes
        if change.fits
    ]
    end = "".join(lines) or "\n  no single change is enough; `lowres fit` searches for several"
    return (
        f"{why}; nothing was loaded. Its peak is in {found.peak_phase}, {found.peak.instant}. "
        f"What would make it fit, cheapest first:{end}\n  (--force runs it nevertheless)"
    )


def to_record(found: MemoryPlan) -> dict[str, Any]:
    """The plan as it stands in the record, without what the record says elsewhere."""
    slim = to_dict(dataclasses.replace(found, curve=None, recipe={}))
    del slim["recipe"], slim["curve"]
    return slim
