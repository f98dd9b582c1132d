"""One run from recipe to record, read top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowres.bridges import accelerate, deepspeed, peft, transformers
from lowres.bridges.bitsandbytes import element_count
from lowres.core.errors import InputError, Interrupted, LowresError, OutOfMemory
from lowres.core.learner import Learner
from lowres.core.recipe import Recipe
from lowres.core.record import Event, Parameters, RunRecord, Score
from lowres.core.units import format_bytes, format_count, gib_to_bytes
from lowres.making import build, choices
from lowres.memory import device as devices
from lowres.memory.held import held
from lowres.memory.meter import Meter
from lowres.run import card, checkpoint, claim, environment, output, processes
from lowres.run.evaluate import evaluate
from lowres.run.foresight import foresee, to_record
from lowres.run.limits import stopping_at_once
from lowres.run.out_of_memory import is_out_of_memory
from lowres.run.progress import Reporter
from lowres.run.remarks import remarks
from lowres.run.session import TrainingSession


def execute(
    recipe: Recipe,
    *,
    output_folder: str | Path | None = None,
    resume: str | None = None,
    force: bool = False,
    plan: bool = True,
    quiet: bool = False,
    look: Callable[[Learner], None] | None = None,
) -> RunRecord:
    """Run a recipe and write its record, whatever happens.

    Args:
        output_folder: A folder that is empty or not there; None takes the next `runs/<recipe>-<n>`.
        resume: `latest` or the path of a checkpoint; None begins anew.
        force: Run although the plan does not fit.
        plan: False to start at once, unplanned.
        quiet: Say nothing.
        look: Given the trained model once it is saved and scored; on every process.

    Returns:
        The record, also written to `<output>/record.json`.

    Raises:
        InputError: When the recipe cannot be run here; nothing is written.
        DoesNotFit: When the plan exceeds the device or the budget; nothing was loaded.
        LowresError: When the run failed; the record says how. Where a resumed run failed before it
            made an update, the record of the part before it stays.
    """
    started = time.monotonic()
    accelerator = accelerate.make(recipe)
    reporter = Reporter(quiet=quiet or not accelerator.is_main_process)
    folder, found, own = claim.folder_of(recipe, accelerator, output_folder, resume)
    record = _new_record(recipe, accelerator)
    record.folder = str(folder)
    meter = Meter(accelerator.device)
    session: TrainingSession | None = None
    refused, begun = False, 0
    at_once = contextlib.ExitStack()
    at_once.enter_context(stopping_at_once())
    try:
        resumed, chosen, entries = None, None, None
        if found is not None:
            resumed = (found, checkpoint.progress_of(found, recipe.digest, recipe.resolved()))
            begun, chosen, entries = resumed[1].step, resumed[1].chosen, resumed[1].entries
            claim.stop_if_finished(folder, found)
        processes.check(recipe, accelerator.num_processes)
        _limit(recipe, accelerator, reporter)
        reporter.say(f"{output.stem(recipe)}: {_plan_line(recipe)}\noutput: {folder}")
        inputs = build.read(recipe)
        record.data = inputs.data.reports
        planned: Any = None
        unplanned: str | None = "no plan: none was asked for"
        if plan:
            planned, unplanned = foresee(recipe, inputs, accelerator, reporter, force)
        record.plan = None if planned is None else to_record(planned)

        # Libraries are loaded before memory is: whether a method needs PEFT must not show as bytes.
        peft.preload()
        meter.start()
        with meter.phase("load", lambda: ()), transformers.loading_in_this_thread():
            made = choices.again(recipe, entries)
            built = build.assemble(recipe, inputs, choose=build.keep(chosen), apply=made)
            module, optimizer = accelerator.prepare(built.model, built.optimizer)
        if accelerator.is_main_process:
            output.write_recipe(folder, recipe)
        learner = dataclasses.replace(built.learner, module=module)
        engine = build.engine_of(recipe, accelerator, learner, optimizer)
        accelerate.checkpoint_trained_only(accelerator, learner.base, recipe.method)
        accelerate.start_trackers(accelerator, folder, recipe)
        record.measured.parameters = _count(built.model)
        _describe(reporter, record, meter)

        def score(step: int) -> list[Score]:
            alive = lambda: held(learner.base, engine.optimizer, recipe.method)
            size = (session.progress if session else recipe.loop).micro_batch_size
            data = inputs.data
            return evaluate(recipe, learner, data, accelerator, meter, step, folder, alive, size)

        session = TrainingSession(
            recipe=recipe, learner=learner, engine=engine, data=inputs.data,
            accelerator=accelerator, meter=meter, reporter=reporter, output=folder,
            started=started, evaluate=score, resume=resumed, rotation=built.rotation,
            largest=planned.updates if planned else (),
        )  # fmt: skip
        if resumed is None:
            for remark in remarks(recipe, built, meter.device, unplanned):
                session.event(*remark)
        else:
            session.event("resumed", f"goes on after update {session.progress.step}")

        recipe.procedure.run(session)

        # Saved before it is scored: a failure in evaluation must not cost the training.
        with meter.phase("save", session.held):
            _save_model(learner, accelerator, folder, record)
        session.guards.end()
        with deepspeed.gathered(learner.base):
            if accelerator.is_main_process:
                session.guards.saved(folder / output.MODEL)
        session.evaluate()
        if look is not None:
            look(dataclasses.replace(learner, module=learner.base))
        record.outcome = "ok"
    except InputError as error:
        refused = True
        raise recipe.located(error) from error
    except (KeyboardInterrupt, Interrupted) as error:
        record.outcome, record.error = "interrupted", str(error) or "stopped at once"
        raise error if isinstance(error, Interrupted) else Interrupted("stopped at once") from None
    except LowresError as error:
        record.outcome, record.error = error.outcome, str(error)  # type: ignore[assignment]
        raise
    except OSError as error:
        record.outcome, record.error = "failed", str(error)
        raise LowresError(f"a file could not be read or written: {error}") from error
    except Exception as error:
        record.outcome, record.error = "failed", f"{type(error).__name__}: {error}"
        if is_out_of_memory(error):
            record.outcome = "oom"
            raise OutOfMemory(
                f"out of memory while loading, scoring or saving ({error}); for scoring lower "
                "loop.eval_batch_size, for loading choose a smaller model or a narrower model.dtype"
            ) from error
        raise
    finally:
        reporter.end()
        if not refused:
            _fill(record, session, meter, started)
            # What an earlier part of the run wrote is worth more than an attempt that made nothing.
            went_on = session is not None and session.progress.step > begun
            worth = found is None or went_on or record.outcome == "ok"
            if worth and accelerator.is_main_process:
                _write(record, recipe, folder, reporter)
            shared = record.outcome in ("ok", "out_of_time")
            accelerate.end_trackers(accelerator, together=shared)
        if own is not None:
            if refused and found is None:
                (folder / output.RECIPE).unlink(missing_ok=True)
            own.release(if_empty=refused)
        at_once.close()
    return record


def _new_record(recipe: Recipe, accelerator: Any) -> RunRecord:
    now = datetime.datetime.now(datetime.UTC)
    return RunRecord(
        id=f"{output.stem(recipe)}-{now:%Y%m%dT%H%M%S}-{recipe.digest[:8]}",
        outcome="failed",
        started=now.isoformat(timespec="seconds"),
        seconds=0.0,
        recipe=recipe.resolved(),
        digest=recipe.digest,
        overrides=list(recipe.overrides),
        task_version=recipe.task.version,
        environment=environment.describe(accelerator.device, accelerator.num_processes),
    )


def _limit(recipe: Recipe, accelerator: Any, reporter: Reporter) -> None:
    """Cap the device's allocator at what a plan has for tensors, which leaves out the context that
    a card of that size would hold too; without a budget, at the whole device.
    """
    device_gib = recipe.budget.device_gib
    if accelerator.device.type != "cuda":
        if device_gib is not None:
            reporter.say(f"budget.device_gib {device_gib} is not enforced: no CUDA device here")
        return
    index = accelerator.device.index
    index = torch.cuda.current_device() if index is None else index
    total = torch.cuda.get_device_properties(index).total_memory
    most = total
    if device_gib is not None:
        if gib_to_bytes(device_gib) > total:
            reporter.say(
                f"budget.device_gib {device_gib} is more than the device's {format_bytes(total)}"
            )
        device = devices.stored(devices.of_torch(accelerator.device))
        most = devices.card(device, device_gib).available_bytes
    torch.cuda.set_per_process_memory_fraction(most / total, index)


def _plan_line(recipe: Recipe) -> str:
    loop, budget = recipe.loop, recipe.budget
    limits = [
        f"{value:g} {unit}"
        for value, unit in (
            (budget.device_gib, "GiB device"),
            (budget.host_gib, "GiB host"),
            (budget.disk_gib, "GiB disk"),
            (budget.minutes, "min"),
        )
        if value is not None
    ]
    levers = "+".join(lever.name for lever in recipe.levers) or "no levers"
    return (
        f"{recipe.model.checkpoint}, {recipe.task.name}, {recipe.method.name}, freezing "
        f"{recipe.freezing.name}, {recipe.objective.name}, {recipe.optimizer.name}, {levers}; "
        f"{loop.global_batch_size} rows an update in micro-batches of {loop.micro_batch_size}; "
        f"limits: {', '.join(limits) or 'none'}"
    )


def _count(model: torch.nn.Module) -> Parameters:
    sizes = [(p.requires_grad, element_count(p)) for p in model.parameters()]
    return Parameters(sum(n for trained, n in sizes if trained), sum(n for _, n in sizes))


def _describe(reporter: Reporter, record: RunRecord, meter: Meter) -> None:
    counts = record.measured.parameters
    assert counts is not None
    held = f", {format_bytes(meter.phases['load'].live_bytes)} at most while loading"
    rows = ", ".join(f"{d.split} {d.rows}" for d in record.data)
    reporter.say(
        f"trains {format_count(counts.trainable)} of {format_count(counts.total)} parameters "
        f"({counts.trainable / counts.total:.2%}){held}; rows: {rows}"
    )


def _save_model(learner: Any, accelerator: Any, folder: Path, record: RunRecord) -> None:
    with deepspeed.gathered(learner.base):
        if accelerator.is_main_process:
            with checkpoint.writing("the model", folder):
                output.in_place(
                    folder / output.MODEL,
                    lambda aside: transformers.save(learner.base, learner.tokenizer, aside),
                )
            record.measured.saved_bytes = checkpoint.folder_bytes(folder / output.MODEL)
    accelerator.wait_for_everyone()


def _fill(record: RunRecord, session: TrainingSession | None, meter: Meter, started: float) -> None:
    """Fill in what was measured, as far as the run came."""
    record.seconds = time.monotonic() - started
    record.measured.phases = meter.phases
    if session is not None:
        record.losses = session.progress.losses
        record.learning_rates = session.progress.learning_rates
        record.scores = session.scores
        record.events = session.progress.events
        record.measured.step_time = session.measuring.step_time()
        record.measured.checkpoint_bytes = session.checkpoint_bytes
        record.measured.train_seconds = session.progress.train_seconds
    with contextlib.suppress(Exception):  # A device that failed fails again when it is asked.
        if session is not None:
            session.measuring.close()
        record.measured.allocator_retries = meter.allocator_retries()
    if record.error:
        record.events.append(Event(len(record.losses), record.outcome, record.error))


def _write(record: RunRecord, recipe: Recipe, folder: Path, reporter: Reporter) -> None:
    """Write the record, and the card of the model if that was saved."""
    try:
        output.write_record(folder, record)
    except OSError as error:
        # Said, not raised: it must not hide what ended the run.
        reporter.say(f"the record could not be written to {folder}: {error}")
    try:
        if (folder / output.MODEL).is_dir():
            card.write(folder / output.MODEL, recipe, record)
    except Exception as error:  # The run is done, and its record is written.
        reporter.say(f"the model's card could not be written to {folder}: {error}")
