"""Parts of a rehearsal beside the updates: an evaluation batch, resuming, the backward pass, and
what is told when the recipe's code fails."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from lowres.bridges import peft
from lowres.bridges.bitsandbytes import quantisation_states
from lowres.core import host
from lowres.core.engine import Engine
from lowres.core.errors import LowresError
from lowres.core.example import Row, collate
from lowres.core.learner import Learner
from lowres.core.recipe import Recipe
from lowres.core.sample import Sample
from lowres.making.data import Data
from lowres.memory.extend import DoesNotRepeat
from lowres.memory.trace import OUTSIDE
from lowres.memory.tracer import TraceFailed, Tracer
from lowres.memory.translate import Target, translating

TRACED_TOKENS = 3
"""Generated tokens that are traced; the cache of keys and values grows evenly with the others."""


@contextlib.contextmanager
def naming_the_place(tracer: Tracer) -> Iterator[None]:
    """Tell what the recipe's code raises on fake tensors as `TraceFailed`, with the place."""
    try:
        yield
    except (LowresError, DoesNotRepeat):
        raise
    except Exception as error:
        (where,) = tracer.modules[-1:] or [tracer.stage]
        what = f"{type(error).__name__} in {where}: {error}"
        raise TraceFailed(f"the recipe's code failed on fake tensors: {what}") from error


def look(
    at: Callable[[Learner, Sample], object], learner: Learner, sample: Sample, tracer: Tracer,
    target: Target,
) -> None:  # fmt: skip
    """Let a part look at training rows before it chooses."""
    # Where weights are loaded, that is where the choice is made.
    quantised = any(quantisation_states(learner.base))
    with translating(tracer, target) if quantised else contextlib.nullcontext():
        at(learner, sample)


class Staged:
    """An engine that says when the backward pass begins.

    Args:
        after: Called after each backward pass.
    """

    def __init__(self, engine: Engine, tracer: Tracer, after: Callable[[Learner], None]) -> None:
        self._engine, self._tracer, self._after = engine, tracer, after
        self.accelerator = engine.accelerator
        self.learner, self.optimizer = engine.learner, engine.optimizer
        self.keeps_gradients = engine.keeps_gradients

    def begin(self, lr: float) -> None:
        self._engine.begin(lr)

    def passes(self) -> Iterator[contextlib.AbstractContextManager[Any]]:
        return self._engine.passes()

    def accumulate(self, loss_sum: torch.Tensor, share: float, last: bool) -> None:
        self._tracer.enter("backward")
        self._engine.accumulate(loss_sum, share, last)
        self._after(self.learner)
        self._tracer.enter("forward")

    def update(self, lr: float, max_grad_norm: float | None) -> float | None:
        return self._engine.update(lr, max_grad_norm)

    def discard(self) -> None:
        self._engine.discard()


def watch_updates(
    engine: Engine, tracer: Tracer, name: Callable[[torch.Tensor | None, str], None]
) -> None:
    """Tell gradients as they come, and make an optimizer's step a stage of its own: both may be in
    the middle of a backward pass.

    Args:
        name: Tells a tensor's category.
    """
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    before: list[tuple[str, list[str]]] = []

    def begin(*_: Any) -> None:
        before.append((tracer.stage, list(tracer.modules)))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name(parameter.grad, "gradients")
        # The place stays: in a backward pass it is the block whose parameter is updated.
        tracer.stage = "optimizer step"
        tracer.modules.clear()

    def end(*_: Any) -> None:
        tracer.stage, tracer.modules[:] = before.pop()

    optimizer.register_step_pre_hook(begin)
    optimizer.register_step_post_hook(end)


def weights_of(learner: Learner) -> Iterator[tuple[torch.Tensor, int, str, str]]:
    """Parameters and buffers with the block they belong to, as `Tracer.hold` takes them."""
    model = peft.unwrap_adapted(learner.base)
    prefix = next((p for p, m in learner.base.named_modules() if m is model), "")
    lead = f"{prefix}." if prefix else ""
    place_of = {lead + name: place for place, name in enumerate(learner.blocks.names)}

    def place(path: str) -> int:
        found = [p for name, p in place_of.items() if path.startswith(name + ".")]
        return found[0] if found else OUTSIDE

    for name, parameter in learner.base.named_parameters():
        kind = "adapters" if parameter.requires_grad and model is not learner.base else "weights"
        yield parameter, place(name), name.rpartition(".")[0], kind
    for name, buffer in learner.base.named_buffers():
        yield buffer, place(name), name.rpartition(".")[0], "weights"
    for path, tensor in quantisation_states(learner.base):
        yield tensor, place(path + "."), path, "quantisation state"


def hold_own(engine: Engine, tracer: Tracer, processes: int, gradient_bytes: int) -> None:
    """What an engine holds from its start: its own buffers, or those of several processes."""
    buffers = getattr(engine, "buffers", None)
    if buffers is not None:
        tracer.hold((tensor, OUTSIDE, "", category) for tensor, category in buffers())
    elif processes > 1:
        # DistributedDataParallel keeps a flat copy of all gradients, in buckets.
        tracer.permanent(gradient_bytes, "gradient buckets of several processes")


def save(engine: Engine, learner: Learner, tracer: Tracer) -> None:
    """What is copied to be written, where an engine has changed how the model is held."""
    saving = getattr(engine, "saving", None)
    if saving is not None:
        tracer.enter("save")
        with tracer:
            saving(learner.base)


def evaluate(
    recipe: Recipe, data: Data, learner: Learner, accelerator: Any, tracer: Tracer
) -> None:
    """Predict the longest batch of each split, once for each shape."""
    learner = dataclasses.replace(learner, module=learner.base)
    learner.base.eval()
    side = recipe.objective.padding_side("predict", recipe.task, learner.kind)
    size = recipe.loop.eval_batch_size or recipe.loop.micro_batch_size
    seen = set()
    for _, rows in data.evaluation.values():
        longest: Sequence[Row] = sorted(rows, key=lambda r: -r.length)[:size]
        batch = collate(longest, int(learner.tokenizer.pad_token_id), side)
        shapes = tuple((k, tuple(v.shape)) for k, v in batch.items())
        if shapes in seen:
            continue
        seen.add(shapes)
        objective, tokens = recipe.objective, getattr(recipe.objective, "max_new_tokens", 0)
        generates = recipe.task.asks == "answer" and tokens > TRACED_TOKENS
        if generates:
            few: Any = {"max_new_tokens": TRACED_TOKENS}
            objective = dataclasses.replace(objective, **few)
        first = len(tracer.trace.births)
        tracer.enter("predict")
        with tracer, torch.no_grad(), accelerator.autocast():
            objective.predict(learner, batch, recipe.task)
        if generates:
            own = recipe.method.positions()  # a soft prompt's keys and values
            given = batch["input_ids"].shape[1] + own if learner.kind == "decoder" else 1
            _grow_cache(tracer, first, given, given + tokens)


def _grow_cache(tracer: Tracer, first: int, given: int, final: int) -> None:
    """Give keys and values that were put together while generating their final length.

    Those of an encoder's output do not grow: a tensor does when its block made such tensors of
    all the traced lengths.
    """
    trace = tracer.trace
    made: dict[int, dict[int, list[int]]] = {}
    for number, birth in enumerate(trace.births[first:], start=first):
        if birth.operation == "aten.cat.default" and birth.place != OUTSIDE:
            made.setdefault(birth.place, {}).setdefault(birth.bytes, []).append(number)
    grown = set()
    for sizes in made.values():
        for unit in [size // given for size in sizes if size % given == 0]:
            lengths = [unit * (given + step) for step in range(TRACED_TOKENS)]
            if all(length in sizes for length in lengths):
                grown |= {number for length in lengths[1:] for number in sizes[length]}
                for number in (n for length in lengths[1:] for n in sizes[length]):
                    trace.births[number].bytes = unit * final
    for event, number in enumerate(trace.tensors):
        if number in grown:
            sign = 1 if trace.sizes[event] > 0 else -1
            trace.sizes[event] = sign * trace.births[number].bytes


def resume(learner: Learner, engine: Engine, tracer: Tracer, target: Target) -> None:
    """States read from a checkpoint take the place of none: the run is as after its start.

    They are read, and copied by optimizers that do, in host memory; what the optimizer holds
    afterwards is on the device, but for what it keeps on the host.
    """
    optimizer = engine.optimizer
    tracer.enter("resume")
    with tracer:
        with target.on_host(tracer):
            read = tree_map_only(torch.Tensor, _like, optimizer.state_dict())
            optimizer.state.clear()
            trained = [torch.empty_like(p) for p in learner.base.parameters() if p.requires_grad]
            optimizer.load_state_dict(read)
            del trained, read
        for parameter, state in optimizer.state.items():
            number = tracer.number(parameter)
            place = OUTSIDE if number is None else tracer.trace.births[number].place
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    tracer.hold([(value, place, "", "optimizer states")])


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return host.empty_like(tensor) if host.holds(tensor) else torch.empty_like(tensor)
