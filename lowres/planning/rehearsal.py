"""A recipe's own run on fake tensors: load, a few updates, an evaluation batch, save, resume.

It goes through the functions that the real run goes through (`build.assemble`, the learner, the
engine, `make_gradients`, the objective's `predict`); only the weights are missing, and the
micro-batches that repeat others.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lowres.bridges import accelerate, deepspeed_shapes, peft, rehearsal, shorten
from lowres.bridges.bitsandbytes import element_count, quantisation_states
from lowres.core import host
from lowres.core.blocks import Blocks
from lowres.core.engine import Engine
from lowres.core.example import all_tokens
from lowres.core.learner import Learner
from lowres.core.recipe import Recipe
from lowres.core.sample import Sample
from lowres.core.scored import Scored
from lowres.making import build, choices
from lowres.making.data import updates_of
from lowres.making.gradients import make_gradients, micro_batches
from lowres.memory.extend import DoesNotRepeat, extend
from lowres.memory.places import following
from lowres.memory.trace import Trace
from lowres.memory.tracer import Tracer
from lowres.memory.translate import Target, translating
from lowres.planning import portions, scenes
from lowres.planning.categories import Categories


@dataclass
class Rehearsal:
    """What a recipe would allocate.

    Args:
        load: Events while the model is loaded and adapted, on the device it is loaded to.
        trace: Everything after that, on the compute device, at full depth.
        host: The same of host memory, where levers keep tensors off the device.
        runs: How the blocks were grouped.
        trainable: Parameters.
        tokens: Real tokens of one update.
        passes: Micro-batches of an update over the traced ones.
        repeats: Padded tokens of an average update over those of the traced micro-batches.
        loads_on_device: The weights are made on the compute device, not moved there afterwards.
        largest_bytes: Of the largest parameter as it is read, which the host holds meanwhile.
        updates: Whose rows were taken.
    """

    load: Trace
    trace: Trace
    host: Trace
    runs: list[shorten.Run]
    names: tuple[str, ...]
    trainable: int
    total: int
    tokens: float
    passes: float
    repeats: float
    loads_on_device: bool
    largest_bytes: int
    updates: list[int]


def rehearse(
    recipe: Recipe,
    inputs: build.Inputs,
    target: Target,
    *,
    whole: bool = False,
    quick: bool = False,
    states_only: bool = False,
    processes: int = 1,
) -> Rehearsal:
    """Trace a recipe.

    Args:
        inputs: As `build.read` gives them; only shapes of the data matter.
        target: The device whose behaviour is traced.
        whole: Trace every block instead of extending from a few.
        quick: For a search. Blocks are left out before the method is applied; of the updates only
            the largest micro-batch is traced; evaluation and resuming are left out.
        states_only: With `quick`: only what the optimizer holds and takes.
        processes: That share the updates; one of them is traced.

    Raises:
        TraceFailed: Where the recipe's code needs data.
        DoesNotRepeat: Where blocks built alike behave differently; ask for the `whole`.
        InputError: As the run would.
    """
    reasons = [recipe.method.uneven(), *(lever.uneven() for lever in recipe.levers)]
    if (uneven := "; ".join(filter(None, reasons))) and not (whole or quick):
        raise DoesNotRepeat(uneven)
    inputs = dataclasses.replace(inputs, config=copy.deepcopy(inputs.config))
    with (
        rehearsal.rehearsing(),
        host.planning(target.kind),
        deepspeed_shapes.planning(processes, target.kind == "cuda", recipe.loop.precision),
        accelerate.alone_on_cpu(recipe) as accelerator,
    ):
        # Its autocast is traced as that of bfloat16, which a CPU has.
        target = dataclasses.replace(target, as_float16=recipe.loop.precision == "fp16")
        stage = _Stage(recipe, inputs, accelerator, target, whole or bool(uneven), quick)
        stage.states_only, stage.processes = states_only, processes
        with scenes.naming_the_place(stage.tracer):
            return stage.play()


def rehearse_quickly(
    recipe: Recipe, inputs: build.Inputs, target: Target, processes: int = 1
) -> Rehearsal:
    """The `quick` rehearsal, of every block where those built alike behave differently."""
    play = functools.partial(rehearse, recipe, inputs, target, quick=True, processes=processes)
    try:
        return play()
    except DoesNotRepeat:
        return play(whole=True)


class _Stage:
    """One rehearsal while it goes on."""

    def __init__(
        self, recipe: Recipe, inputs: build.Inputs, accelerator: Any, target: Target,
        whole: bool, quick: bool,
    ) -> None:  # fmt: skip
        self.recipe, self.inputs, self.accelerator = recipe, inputs, accelerator
        self.target, self.whole, self.quick = target, whole, quick
        self.states_only, self.processes = False, 1
        self.later: list[Callable[[], None]] = []
        self.tracer = Tracer()
        self.categories = Categories(self.tracer)
        self.runs: list[shorten.Run] = []
        self.names: tuple[str, ...] = ()
        self.shown: list[portions.Shown] = []

    def play(self) -> Rehearsal:
        tracer = self.tracer
        with tracer:
            tracer.enter("load")
            built = build.assemble(
                self.recipe,
                self.inputs,
                load=functools.partial(
                    rehearsal.load_shapes, later=self.later if self.quick else None
                ),
                chosen=self._shorten if self.quick else None,
                adapted=self._adapted,
                choose=self._choose,
                apply=functools.partial(choices.expected, self.recipe, self._look),
            )
            module, optimizer = self.accelerator.prepare(built.model, built.optimizer)
        load = tracer.start_anew()
        learner = dataclasses.replace(built.learner, module=module)
        if not self.quick:
            data = self.inputs.data
            larger = portions.larger(self.recipe, data, learner.only_targets, self.processes)
            self.shown = portions.updates_shown(self.recipe, data, self.names, larger)
        tracer.hold(scenes.weights_of(learner))
        if self.target.kind == "cuda":  # What waits on the host was loaded there.
            self.loads_on_device &= not any(host.holds(p) for p in built.model.parameters())
        with tracer:
            engine = build.engine_of(self.recipe, self.accelerator, learner, optimizer)
        scenes.watch_updates(engine, tracer, self.categories.name)
        scenes.hold_own(engine, tracer, self.processes, self.saved_bytes)
        tokens = passes = repeats = 0.0
        with self._following(learner), translating(tracer, self.target):
            for number, shown in enumerate(self.shown):
                if number < 2:
                    tracer.mark(("first_step", "steady_steps")[number])
                with tracer:
                    built.rotation.turn(engine.optimizer, shown.turn)
                tokens, passes, repeats = self._update(learner, engine, number)
                self.categories.states(engine)
            tracer.mark("save")
            scenes.save(engine, learner, tracer)
            tracer.mark("evaluate")
            if not self.quick:
                scenes.evaluate(self.recipe, self.inputs.data, learner, self.accelerator, tracer)
            tracer.mark("resume")
            if not self.quick:
                scenes.resume(learner, engine, tracer, self.target)
            tracer.mark("end")
        tracer.close()
        trace = tracer.trace
        if self.recipe.loop.precision == "fp16":
            trace.costs = [c.in_float16() for c in trace.costs]
        for run in reversed(self.runs):
            # From the last run to the first, so that places before it are still those of the trace.
            start = sum(len(r.kept) for r in self.runs[: self.runs.index(run)])
            trace = extend(trace, start + len(run.kept) - 3, run.length - len(run.kept))
        trace, waiting = trace.apart()
        return Rehearsal(
            load=load, trace=trace, host=waiting, runs=self.runs, names=self.names,
            trainable=self.trainable, total=self.total, tokens=tokens, passes=passes,
            repeats=repeats, loads_on_device=self.loads_on_device,
            largest_bytes=self.largest_bytes,
            updates=portions.played(self.recipe, self.inputs.data, self.shown),
        )  # fmt: skip

    def _adapted(self, learner: Learner) -> None:
        """Count what is there, then leave only the blocks that are traced."""
        parameters = list(learner.base.parameters())
        self.total = sum(element_count(p) for p in parameters)
        trained = [p for p in parameters if p.requires_grad]
        self.trainable = sum(p.numel() for p in trained)
        self.saved_bytes = sum(p.nbytes for p in trained)
        width = getattr(torch, self.recipe.model.dtype).itemsize
        self.largest_bytes = max(element_count(p) for p in parameters) * width
        quantised = any(quantisation_states(learner.base))
        self.loads_on_device = self.target.kind == "cpu" or quantised
        if not self.runs:
            self._shorten(learner)

    def _choose(self, learner: Learner) -> Blocks:
        recipe, names = self.recipe, learner.blocks.names
        self.shown = portions.updates_shown(recipe, self.inputs.data, names)
        if not isinstance(recipe.freezing, Scored):
            return recipe.freezing.blocks(learner, build.sample_of(recipe, self.inputs))
        self._look(recipe.freezing.scores, learner)
        return Scored.keep(learner.blocks, recipe.freezing.costliest(names))

    def _look(self, at: Callable[[Learner, Sample], object], learner: Learner) -> None:
        if not self.quick:
            sample = build.sample_of(self.recipe, self.inputs, largest_only=True)
            scenes.look(at, learner, sample, self.tracer, self.target)

    def _shorten(self, learner: Learner) -> None:
        model, blocks = peft.unwrap_adapted(learner.base), learner.blocks
        self.names = blocks.names
        played = portions.parts_played(self.recipe, blocks.names, self.shown)
        roles = {name: (name in blocks.trained, played.get(name)) for name in blocks.names}
        self.runs = shorten.runs_of(model, self.names, roles, not self.whole)
        kept = [place for run in self.runs for place in run.kept]
        if len(kept) < len(self.names):
            names = shorten.shorten(model, self.names, kept)
            still = [n for n, place in zip(names, kept, strict=True)
                     if self.names[place] in blocks.trained]  # fmt: skip
            learner.blocks = dataclasses.replace(blocks, names=names, trained=frozenset(still))
        for fill in self.later:
            fill()

    def _following(self, learner: Learner) -> contextlib.AbstractContextManager[None]:
        model = peft.unwrap_adapted(learner.base)
        blocks = [model.get_submodule(name) for name in learner.blocks.names]
        return following(self.tracer, learner.base, blocks)

    def _update(self, learner: Learner, engine: Engine, number: int) -> tuple[float, float, float]:
        recipe, tracer, step = self.recipe, self.tracer, min(number, 1)
        last, total = number == len(self.shown) - 1, updates_of(recipe, len(self.inputs.data.train))
        learner.base.train()
        rows = portions.rows_of(recipe, self.inputs.data, self.shown[number].rows, self.processes)
        with tracer:
            tracer.enter("forward")
            recipe.method.before_update(learner.base, step, total)
            with self.target.on_host(tracer):
                batches = micro_batches(recipe, learner, rows, recipe.loop.micro_batch_size)
            counts = recipe.objective if learner.only_targets else None
            only = portions.telling(batches, counts, getattr(engine, "last_differs", False))
            engine.begin(1.0)
            quick = self.quick and engine.keeps_gradients
            if quick and (not last or self.states_only):
                # What a first update leaves are optimizer states, and that takes only gradients.
                self.categories.put_gradients(learner)
                tracer.costing = last
                tracer.enter("optimizer step")
                engine.update(1.0, recipe.loop.max_grad_norm)
                tracer.costing = False
                return 0.0, 0.0, 0.0
            first, *others = (portions.elements(batches[n]) for n in sorted(only))
            if quick and others and first <= max(others):
                # What the first micro-batch of an update leaves are gradients.
                only -= {0}
                self.categories.put_gradients(learner)
            there = only if self.target.kind == "cuda" else range(len(batches))
            self.categories.batches(batches, there)
            passes, traced = len(batches) / len(only), sum(all_tokens(batches[n]) for n in only)
            tracer.costing, told = last, scenes.Staged(engine, tracer, self.categories.gradients)
            make_gradients(recipe.objective, learner, told, self.accelerator, batches, 0, only,
                           recipe.method)  # fmt: skip
            del batches
            tracer.enter("optimizer step")
            recipe.method.after_gradients(learner.base, step, total)
            engine.update(1.0, recipe.loop.max_grad_norm)
            recipe.method.after_update(learner.base, step, total)
            tracer.costing = False
        usual, tokens = portions.usual_work(recipe, self.inputs.data)
        return tokens, passes, usual / self.processes / traced
