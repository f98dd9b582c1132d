"""A prepared run while it trains: an update at a time, measured, recoverable, within its budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lowres.bridges import accelerate
from lowres.core import errors, schedule
from lowres.core.engine import Engine
from lowres.core.example import Row
from lowres.core.learner import Learner
from lowres.core.parts import values
from lowres.core.recipe import Recipe
from lowres.core.record import Event, Score
from lowres.core.rotation import Rotation
from lowres.making import choices
from lowres.making.data import Data, Order, updates_of
from lowres.making.gradients import make_gradients, micro_batches
from lowres.memory.held import held
from lowres.memory.meter import Meter
from lowres.run import checkpoint
from lowres.run.checkpoint import Progress
from lowres.run.guards import Guards
from lowres.run.limits import Limits
from lowres.run.measuring import Measuring
from lowres.run.out_of_memory import is_out_of_memory
from lowres.run.output import Losses
from lowres.run.progress import Reporter


class TrainingSession:
    """Implements `core.session.Session` over accelerate.

    Args:
        evaluate: Scores the splits after `step` updates.
        output: The run's folder.
        started: `time.monotonic()` at the start of the run, for the time budget.
        resume: Where the checkpoint to go on from lies, with its progress; None to begin.
        rotation: Sets what trains in each update.
        largest: Updates whose memory is looked at beside that of the first two.
    """

    def __init__(
        self,
        *,
        recipe: Recipe,
        learner: Learner,
        engine: Engine,
        data: Data,
        accelerator: Any,
        meter: Meter,
        reporter: Reporter,
        output: Path,
        started: float,
        evaluate: Callable[[int], list[Score]],
        resume: tuple[Path, Progress] | None,
        rotation: Rotation,
        largest: Container[int],
    ) -> None:
        self.recipe, self.learner, self.engine, self.data = recipe, learner, engine, data
        self.accelerator, self.meter, self.reporter = accelerator, meter, reporter
        self.output, self.started, self._evaluate = output, started, evaluate
        self._rotation = rotation
        self.total = updates_of(recipe, len(data.train))
        loop = recipe.loop
        lengths = [row.length for row in data.train]
        self._order = Order(lengths, loop.global_batch_size, self.total, loop.seed)
        self._warmup = round(loop.warmup_ratio * self.total)
        self.scores: list[Score] = []
        self.progress = checkpoint.none_done(recipe, learner, data.train)
        self.progress.chosen, self.progress.entries = choices.made(recipe, learner)
        if resume is not None:
            folder, there = resume
            checkpoint.stop_at_others(folder, there, self.progress)
            self.progress = there
            self.scores = [Score(**s) for s in self.progress.scores]
            self.progress.micro_batch_size = min(there.micro_batch_size, loop.micro_batch_size)
            checkpoint.load(accelerator, folder)
        self._losses = Losses(output, accelerator.is_main_process, self.progress)
        self.measuring = Measuring(meter, self.held, largest)
        self._limits = Limits(recipe.budget, output, started, reporter)
        # Not read off `base.training`: PEFT's wrapper says True around a model that was loaded in
        # evaluation mode.
        self._in_training_mode = False
        self.checkpoint_bytes: int | None = None
        self.guards = Guards(recipe, learner.base, engine.optimizer, self.event,
                             engine.keeps_gradients)  # fmt: skip
        self.guards.begin()

    def updates(self) -> Iterator[tuple[int, Sequence[Row]]]:
        self.reporter.begin(self.progress.step, self.total)
        with self._limits.stopping_between_updates():
            for step in range(self.progress.step, self.total):
                yield step, [self.data.train[i] for i in self._order.rows(step)]
        self.measuring.close()
        if self.recipe.loop.save_every is not None and self.measuring.made:
            self._save()

    def update(self, step: int, rows: Sequence[Row]) -> float:
        recipe = self.recipe
        if not self._in_training_mode:
            self.learner.base.train()
            self._in_training_mode = True
        start = time.perf_counter()
        with self.measuring.update(step):
            self._rotation.turn(self.engine.optimizer, step)
            recipe.method.before_update(self.learner.base, step, self.total)
            factor = schedule.factor(recipe.loop.schedule, step, self.total, self._warmup)
            self.engine.begin(factor)
            loss_sum, targets, tokens = self._gradients(step, rows)
            while self.learner.remarks:
                self.event("lever", self.learner.remarks.pop(0))
            loss = loss_sum / targets
            if loss != loss or abs(loss) == float("inf"):
                raise errors.Diverged(
                    f"the loss of update {step + 1} is {loss}; lower optimizer.lr (now "
                    f"{values(recipe.optimizer).get('lr')}), set loop.max_grad_norm, or use "
                    "loop.precision: bf16 instead of fp16"
                )
            self.guards.gradients(getattr(self.accelerator, "scaler", None))
            recipe.method.after_gradients(self.learner.base, step, self.total)
            norm, skipped = self._step(factor)
            if skipped:
                self.event("skipped", f"update {step + 1} overflowed in float16 and was skipped")
            if self.accelerator.device.type == "cuda":
                torch.cuda.synchronize(self.accelerator.device)
        seconds = time.perf_counter() - start
        self.guards.updated(skipped)
        recipe.method.after_update(self.learner.base, step, self.total)
        self.progress.train_seconds += seconds
        self.measuring.took(step, seconds, tokens)
        rate = self.engine.optimizer.param_groups[0]["lr"]
        self.progress.step = step + 1
        self.progress.losses.append(loss)
        self.progress.learning_rates.append(rate)
        self._losses.add(step + 1, loss, rate, norm, tokens / seconds)
        if recipe.loop.trackers:
            self.accelerator.log({"loss": loss, "learning_rate": rate}, step=step + 1)
        self.reporter.update(step + 1, loss, tokens / seconds, self.accelerator.device)
        return loss

    def after(self, step: int) -> None:
        loop, made = self.recipe.loop, step + 1
        if loop.eval_every and made % loop.eval_every == 0 and made < self.total:
            self.evaluate()
        saved = loop.save_every is not None and made % loop.save_every == 0 and made < self.total
        if saved:
            self._save()
        self._stop_where_limits_say(last=made == self.total, saved=saved)

    def evaluate(self) -> None:
        """Score now; the scores are kept and shown."""
        self.measuring.close()
        self._in_training_mode = False
        found = self._evaluate(self.progress.step)
        self.scores += found
        self.progress.scores = [vars(s) for s in self.scores]
        self.reporter.scores(found)

    def event(self, kind: str, text: str, names: Sequence[str] = ()) -> None:
        """Note something that a reader of the record should know, and say it with a few names."""
        self.progress.events.append(Event(self.progress.step, kind, text + ", ".join(names)))
        self.reporter.say(text + errors.some(names))

    def held(self) -> Iterable[torch.Tensor]:
        """The tensors that are alive between updates."""
        return held(self.learner.base, self.engine.optimizer, self.recipe.method)

    def _gradients(self, step: int, rows: Sequence[Row]) -> tuple[float, float, float]:
        """Make the gradients of the mean loss; returns the loss sum, targets and tokens."""
        while True:
            try:
                return self._try_gradients(step, rows)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                message = str(error).partition("\n")[0]
            # Outside the handler: the exception's traceback would keep the activations alive.
            self.engine.discard()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            size = self.progress.micro_batch_size
            if self.accelerator.num_processes > 1:
                raise errors.OutOfMemory(
                    f"out of memory at micro-batch {size} in one of several processes ({message}); "
                    f"set loop.micro_batch_size to {max(1, size // 2)} and --resume"
                )
            if size == 1:
                raise errors.OutOfMemory(
                    f"out of memory at micro-batch 1 ({message}); lower loop.max_length, recompute "
                    "activations (lowres list levers), or train fewer parameters or blocks"
                )
            self.progress.micro_batch_size = -(-size // 2)
            self.event(
                "out_of_memory",
                f"update {step + 1} ran out of memory at micro-batch {size}; it is repeated at "
                f"{self.progress.micro_batch_size} with the same global batch",
            )

    def _try_gradients(self, step: int, rows: Sequence[Row]) -> tuple[float, float, float]:
        accelerator = self.accelerator
        share = -(-len(rows) // accelerator.num_processes)
        own = rows[accelerator.process_index * share :][:share]
        batches = micro_batches(self.recipe, self.learner, own, self.progress.micro_batch_size)
        # A function of seed, update and process alone: a repeated or resumed update draws the same
        # dropout.
        seed = _seed(self.recipe.loop.seed, step, accelerator.process_index)
        return make_gradients(self.recipe.objective, self.learner, self.engine, accelerator,
                              batches, seed, method=self.recipe.method)  # fmt: skip

    def _step(self, factor: float) -> tuple[float | None, bool]:
        """The norm of the gradients, if any, and whether float16's loss scaler left the update out:
        then it lowers its scale, whichever optimizer it is. accelerate does not see that of a fused
        one, which leaves the update out itself.
        """
        scale = accelerate.loss_scale(self.accelerator)
        try:
            norm = self.engine.update(factor, self.recipe.loop.max_grad_norm)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise errors.OutOfMemory(
                f"out of memory in the optimizer step ({error}); its states do not shrink with the "
                "micro-batch: train fewer parameters or freeze more"
            ) from error
        after = accelerate.loss_scale(self.accelerator)
        skipped = getattr(self.engine.optimizer, "step_was_skipped", False) or (
            scale is not None and after is not None and after < scale
        )
        return (norm if norm is not None and math.isfinite(norm) else None), skipped

    def _stop_where_limits_say(self, *, last: bool, saved: bool) -> None:
        """Save and end the run when asked to or, with updates left, when over its budget."""
        exceeded = accelerate.sum_over_processes(self.accelerator, self._limits.exceeded())
        if last:
            exceeded = [exceeded[0], 0.0, 0.0, 0.0]
        if any(exceeded):
            if not saved:
                self._save()
            raise self._limits.error(exceeded, self.progress.step, self.total)

    def _save(self) -> None:
        self.measuring.close()
        with self.meter.phase("save"):
            self.checkpoint_bytes = checkpoint.save(
                self.accelerator, self.output, self.progress, self.recipe.loop.keep_checkpoints
            )


def _seed(seed: int, step: int, process: int) -> int:
    # An odd multiplier keeps neighbouring (seed, step, process) apart within 63 bits.
    return (seed * 1_000_003 + step * 10_007 + process * 7_919_999_983 + 1) % (1 << 63)
