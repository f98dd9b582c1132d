"""Parts of a rehearsal beside the updates: an evaluation batch, resuming, the backward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from lowres.bridges import peft, shorten
from lowres.bridges.bitsandbytes import quantisation_states
from lowres.bridges.streaming import streamed_tensors
from lowres.core.engine import Engine
from lowres.core.example import Row, collate
from lowres.core.learner import Learner
from lowres.core.recipe import Recipe
from lowres.memory.trace import OUTSIDE
from lowres.memory.tracer import Tracer
from lowres.memory.translate import Target
from lowres.run.data import Data

TRACED_TOKENS = 3
"""Generated tokens that are traced; the cache of keys and values grows evenly with the others."""


class Staged:
    """An engine that says when the backward pass begins.

    Args:
        after: Called after each backward pass.
    """

    def __init__(self, engine: Engine, tracer: Tracer, after: Callable[[Learner], None]) -> None:
        self._engine, self._tracer, self._after = engine, tracer, after
        self.learner, self.optimizer = engine.learner, engine.optimizer

    def accumulate(self, loss_sum: torch.Tensor, share: float, last: bool) -> None:
        self._tracer.enter("backward")
        self._engine.accumulate(loss_sum, share, last)
        self._after(self.learner)
        self._tracer.enter("forward")

    def update(self, lr: float, max_grad_norm: float | None) -> float | None:
        return self._engine.update(lr, max_grad_norm)

    def discard(self) -> None:
        self._engine.discard()


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


def hold_weights(
    learner: Learner, tracer: Tracer, target: Target, runs: Sequence[shorten.Run]
) -> int:
    """Count what is on the device when training begins. Returns the bytes that stay on a host.

    Args:
        runs: How blocks were grouped; a block that was left out is like the inner ones of its run.
    """
    on_host = {t.untyped_storage()._cdata for t in streamed_tensors(learner.base)}
    if target.kind == "cpu" or not on_host:
        tracer.hold(weights_of(learner))
        return 0
    times: list[int] = []
    for run in runs:
        times += [1] * len(run.kept)
        times[-len(run.kept) // 2] += run.length - len(run.kept)
    host_bytes = 0
    for held in weights_of(learner):
        storage = held[0].untyped_storage()
        if storage._cdata in on_host:
            host_bytes += storage.nbytes() * times[held[1]]
        else:
            tracer.hold([held])
    return host_bytes


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
            given = batch["input_ids"].shape[1] if learner.kind == "decoder" else 1
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
    afterwards is on the device.
    """
    optimizer = engine.optimizer
    tracer.enter("resume")
    with tracer:
        with target.on_host(tracer):
            read = tree_map_only(torch.Tensor, torch.empty_like, optimizer.state_dict())
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
