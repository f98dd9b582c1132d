"""One recipe of the GPU suite, in a process of its own: planned, run, measured, recorded.

    python -m benchmarks.gpu.measure JOB.json

The phases are those of `lowres.run.execute`, through the same functions; only rows and weights are
made up. What needs no GPU is done before the process waits for its turn on it, so that planning one
recipe and timing another go on side by side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from benchmarks.gpu import snapshots, weights
from benchmarks.gpu.boundaries import Foreseen, NoBoundary, foresee, foresee_side
from benchmarks.gpu.jobs import POSTPONED, SKIPPED, Job, write
from benchmarks.gpu.recipes import Case
from lowres.bridges import accelerate, peft, transformers
from lowres.core import host
from lowres.core.errors import Diverged, InputError, LowresError
from lowres.core.example import collate
from lowres.core.recipe import Recipe
from lowres.core.record import Event, Parameters, PhaseMemory, RunRecord, StepTime
from lowres.making import build
from lowres.making.gradients import make_gradients, micro_batches
from lowres.memory import device as devices
from lowres.memory.held import held
from lowres.memory.meter import Meter
from lowres.planning import portions
from lowres.planning.plan import choose_card
from lowres.run import environment
from lowres.run.foresight import to_record
from lowres.run.measuring import PROBED_UPDATES, WARM_UP_UPDATES
from lowres.run.out_of_memory import is_out_of_memory

SAVED_AT_MOST = 2 << 30
"""Larger models are not written: it would time the disk."""


@dataclasses.dataclass
class Measuring:
    """One recipe under way, and what it has told so far."""

    recipe: Recipe
    inputs: build.Inputs
    scratch: Path
    capacity_bytes: int | None
    traced: bool
    record: RunRecord
    reached: str = "load"
    trace: dict[str, Any] | None = None
    watch: snapshots.Watch | None = None
    resumed: PhaseMemory | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    tokens: list[float] = dataclasses.field(default_factory=list)

    def run(self) -> None:
        """Load, update, save, evaluate, resume; fills in the record."""
        recipe, inputs = self.recipe, self.inputs
        peft.preload()
        # Fresh weights are made on the host, and so is what is put into fewer bits there: a copy is
        # all that the device sees of it.
        built = None
        if torch.cuda.is_available() and recipe.model.init == "random":
            built = build.assemble(recipe, inputs, load=weights.fresh_model)
        elif torch.cuda.is_available() and any(x.name == "frozen_offload" for x in recipe.levers):
            with transformers.loading_in_this_thread():
                built = build.assemble(recipe, inputs)
        with self._turn():
            accelerator = accelerate.make(recipe)
            if self.capacity_bytes is not None:
                _, total = torch.cuda.mem_get_info()
                torch.cuda.set_per_process_memory_fraction(self.capacity_bytes / total)
                self.watch = snapshots.Watch()
            if self.traced:
                snapshots.begin_history()
            self.record.environment |= environment.describe(accelerator.device, 1)
            meter = Meter(accelerator.device)
            try:
                self._phases(accelerator, meter, built)
            finally:
                self.resumed = meter.phases.pop("resume", None)  # type: ignore[call-overload]
                self.record.measured.phases = meter.phases
                self.record.measured.allocator_retries = meter.allocator_retries()

    def _phases(self, accelerator: Any, meter: Meter, built: build.Built | None) -> None:
        recipe, inputs, record = self.recipe, self.inputs, self.record
        with meter.phase("load", lambda: ()), transformers.loading_in_this_thread():
            built = built or build.assemble(recipe, inputs)
            module, optimizer = accelerator.prepare(built.model, built.optimizer)
        learner = dataclasses.replace(built.learner, module=module)
        self.rotation = built.rotation
        engine = build.engine_of(recipe, accelerator, learner, optimizer)
        counted = list(learner.base.parameters())
        trained = sum(p.numel() for p in counted if p.requires_grad)
        record.measured.parameters = Parameters(trained, sum(p.numel() for p in counted))
        alive = lambda: held(learner.base, engine.optimizer)

        learner.base.train()
        for step in range(PROBED_UPDATES):
            self.reached = "first_step" if step == 0 else "steady_steps"
            with meter.phase(self.reached, alive):  # type: ignore[arg-type]
                self._update(learner, engine, accelerator, step)
        if self.traced:
            self.trace = snapshots.end_history(self.capacity_bytes)
        with meter.phase("steady_steps"):
            for step in range(PROBED_UPDATES, recipe.loop.steps or 0):
                start = time.perf_counter()
                tokens = self._update(learner, engine, accelerator, step)
                self.seconds.append(time.perf_counter() - start)
                self.tokens.append(tokens)
        record.measured.step_time = self._step_time()

        self.reached = "save"
        adapted = hasattr(learner.base, "peft_config")
        if adapted or sum(p.numel() * p.element_size() for p in counted) <= SAVED_AT_MOST:
            with meter.phase("save", alive):
                transformers.save(learner.base, learner.tokenizer, self.scratch / "saved")

        self.reached = "evaluate"
        learner = dataclasses.replace(learner, module=learner.base)
        learner.base.eval()
        side = recipe.objective.padding_side("predict", recipe.task, learner.kind)
        for _, rows in inputs.data.evaluation.values():
            batch = collate(rows, int(learner.tokenizer.pad_token_id), side)
            batch = {k: v.to(accelerator.device) for k, v in batch.items()}
            with torch.no_grad(), meter.phase("evaluate", alive), accelerator.autocast():
                recipe.objective.predict(learner, batch, recipe.task)

        if any(lever.whole_process for lever in recipe.levers):
            return  # Its states have a form of their own.
        self.reached = "resume"
        self._resume(engine.optimizer, meter, alive)

    def _resume(self, optimizer: Any, meter: Meter, alive: Callable[[], Any]) -> None:
        """Give the optimizer its states from the host, as a run does that goes on.

        Records know no such phase, but a plan does, and what fits is decided with it.
        """
        # Twice the states of a large model would be more than the host has.
        copied = lambda t: t if host.holds(t) else t.to("cpu", copy=True)
        read = tree_map_only(torch.Tensor, copied, optimizer.state_dict())
        optimizer.state.clear()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # a fresh process has nothing cached
        with meter.phase("resume", alive):  # type: ignore[arg-type]
            optimizer.load_state_dict(read)

    def _update(self, learner: Any, engine: Any, accelerator: Any, step: int) -> float:
        """One update as a session makes it; returns its tokens."""
        recipe = self.recipe
        self.rotation.turn(engine.optimizer, step)
        recipe.method.before_update(learner.base, step, recipe.loop.steps or step + 1)
        rows = portions.rows_of(recipe, self.inputs.data, step)
        engine.begin(1.0)
        batches = micro_batches(recipe, learner, rows, recipe.loop.micro_batch_size)
        loss, targets, tokens = make_gradients(
            recipe.objective, learner, engine, accelerator, batches, step + 1,
            method=recipe.method,
        )  # fmt: skip
        if loss != loss or abs(loss) == float("inf"):
            raise Diverged(f"the loss of update {step + 1} is {loss}")
        engine.update(1.0, recipe.loop.max_grad_norm)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize(accelerator.device)
        self.record.losses.append(loss / targets)
        return tokens

    def _step_time(self) -> StepTime | None:
        seconds, tokens = self.seconds[WARM_UP_UPDATES:], self.tokens[WARM_UP_UPDATES:]
        if len(seconds) < 2:
            return None
        cuts = statistics.quantiles(seconds, n=10, method="inclusive")
        rate = sum(tokens) / sum(seconds)
        return StepTime(len(seconds), cuts[1], statistics.median(seconds), cuts[7], rate)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Alone on the device: another process's kernels would stand in the step times."""
        with (self.scratch.parent / "turn.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def run(job: Job) -> None:
    """Measure a job's recipe and write its record, whatever came of it.

    Raises:
        SystemExit: POSTPONED or SKIPPED; nothing was written.
    """
    started = time.monotonic()
    case = job.case
    scratch, home = Path(job.scratch), Path(job.records)
    folder = Path(job.configs) / case.model
    device = devices.load("cpu") if job.tiny else devices.present()
    try:
        if case.stored:
            with (scratch / f"{case.model}.lock").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                folder = weights.checkpoint(folder, scratch / case.model)
        if case.side is None:
            found = foresee(case, folder, device, None)
        else:
            found = foresee_side(case, folder, device, home / "boundaries")
    except (weights.NoRoom, NoBoundary, InputError) as why:
        print(why)
        raise SystemExit(SKIPPED) from None
    _stop_if_late(job, found)
    if case.card is not None:
        _imitate(found.device)
    record = _new_record(case, found, job.commit)
    card = choose_card(found.local, found.device)[1]
    capacity = card.available_bytes if card is not None and card.kind == "cuda" else None
    own = scratch / str(os.getpid())
    own.mkdir()
    measuring = Measuring(found.local, found.inputs, own, capacity,
                          case.traced and capacity is not None, record)  # fmt: skip
    suite: dict[str, Any] = {
        "model": case.model, "side": case.side, "capacity_bytes": capacity, "out_of_memory": None,
        "updates_seconds": measuring.seconds, "card": card and card.name,
        "imitated": case.card is not None,
    }  # fmt: skip
    try:
        measuring.run()
        record.outcome = "ok"
    except LowresError as error:
        record.outcome = error.outcome  # type: ignore[assignment]
        record.error = str(error).replace(str(folder), case.model)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        suite["out_of_memory"] = measuring.watch and measuring.watch.told()
        record.outcome, record.error = "oom", str(error).partition("\n")[0]
        record.events.append(Event(len(record.losses), "oom", f"in {measuring.reached}"))
    finally:
        shutil.rmtree(own)
    suite["reached"] = measuring.reached
    suite["resume"] = measuring.resumed and dataclasses.asdict(measuring.resumed)
    record.seconds = time.monotonic() - started
    if measuring.trace is not None:
        snapshots.write_trace(home / "traces" / f"{case.name}.json.gz", measuring.trace)
    write(home, case.name, record, suite)


def _stop_if_late(job: Job, found: Foreseen) -> None:
    """Leave a recipe for the next part where its planned time would carry this one over."""
    # The seconds of a card that is imitated are not those of the one at hand.
    imitated = job.case.card is not None
    step = found.plan.step if found.plan is not None and not imitated else None
    updates = (found.recipe.loop.steps or 0) * (step.seconds if step is not None else 1.0)
    if job.deadline is not None and time.time() + 10 + 1.5 * updates > job.deadline:
        raise SystemExit(POSTPONED)


def _imitate(device: devices.Device | None) -> None:
    """Have torch choose workspaces and attention as on that card, which it does by the real one."""
    capability = (device.compute_capability if device is not None else None) or (8, 6)
    if capability < (9, 0):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
        os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")


def _new_record(case: Case, found: Foreseen, commit: str | None) -> RunRecord:
    now = datetime.datetime.now(datetime.UTC)
    recipe = found.recipe
    return RunRecord(
        id=f"{case.name}-{now:%Y%m%dT%H%M%S}", outcome="failed",
        started=now.isoformat(timespec="seconds"), seconds=0.0, recipe=recipe.resolved(),
        digest=recipe.digest, overrides=[], task_version=recipe.task.version,
        environment={"commit_given": commit} if commit else {},
        plan=found.plan and to_record(found.plan),
        events=[Event(0, "plan", found.remark)] if found.remark else [],
    )  # fmt: skip


if __name__ == "__main__":
    run(Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
