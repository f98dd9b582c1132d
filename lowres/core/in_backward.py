"""Updates in the backward pass: each parameter's as soon as its gradient is there.

The parameters' gradients never exist together. What that excludes is refused here, in the words of
the one who asks for it: a lever over any optimizer, or an optimizer that knows no other way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lowres.core.errors import InputError, LowresError, OutOfMemory, Problem

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.engine import Engine
    from lowres.core.recipe import Recipe


def refusals(recipe: Recipe) -> Iterator[str]:
    """What in the loop needs all gradients at once: the value, the reason, the nearest choice."""
    loop = recipe.loop
    if loop.accumulation != 1:
        yield (
            f"it drops each gradient at once, so it cannot accumulate {loop.accumulation} "
            f"micro-batches; set loop.micro_batch_size to {loop.global_batch_size}, or "
            f"loop.global_batch_size to {loop.micro_batch_size} with a lower optimizer.lr"
        )
    if loop.max_grad_norm is not None:
        yield (
            f"a norm over all gradients (loop.max_grad_norm {loop.max_grad_norm:g}) needs them all "
            "at once; set loop.max_grad_norm to null"
        )
    if loop.precision == "fp16":
        yield (
            "loss scaling (loop.precision fp16) looks at all gradients before an update; set "
            "loop.precision to bf16 or no"
        )


def step_one(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: nn.Parameter
) -> None:
    """Update one parameter with an optimizer over many; its states stay where they are."""
    groups = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": [parameter]}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups


class UpdatesInBackward:
    """An engine whose every parameter is updated and its gradient freed once it is accumulated.

    One optimizer holds the states of all parameters, so checkpoints are those of the plain run.

    Args:
        engine: Makes the gradients.
        name: Of the part that asks for it, for messages.

    Raises:
        InputError: Under several processes, which would have to exchange each gradient first.
    """

    keeps_gradients = False

    def __init__(self, engine: Engine, name: str) -> None:
        if engine.accelerator.num_processes > 1:
            raise InputError(
                "the recipe",
                [
                    Problem(
                        "loop",
                        f"'{name}' updates a parameter before its gradient is summed over "
                        f"{engine.accelerator.num_processes} processes; run one process, or drop "
                        "it",
                    )
                ],
            )
        self._engine, self._name = engine, name
        self.accelerator = engine.accelerator
        self.learner, self.optimizer = engine.learner, engine.optimizer
        self._factor = 1.0
        for place, group in enumerate(self.optimizer.param_groups):
            for parameter in group["params"]:
                self._watch(parameter, place)

    def _watch(self, parameter: nn.Parameter, place: int) -> None:
        def update(parameter: nn.Parameter) -> None:
            # Looked up at each update: reading a checkpoint exchanges the groups.
            step_one(self.optimizer, self.optimizer.param_groups[place], parameter)
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(update)  # type: ignore[no-untyped-call]

    def begin(self, lr: float) -> None:
        self._factor = lr
        self._engine.begin(lr)

    def passes(self) -> Iterator[contextlib.AbstractContextManager[Any]]:
        return self._engine.passes()

    def accumulate(self, loss_sum: torch.Tensor, share: float, last: bool) -> None:
        if not last:
            raise LowresError(
                f"'{self._name}' updates in the backward pass, so an update cannot have several "
                "micro-batches"
            )
        self._engine.accumulate(loss_sum, share, last)

    def update(self, lr: float, max_grad_norm: float | None) -> float | None:
        """Nothing is left to do. Raises LowresError where the updates were made with other values
        than these.
        """
        if lr != self._factor or max_grad_norm is not None:
            raise LowresError(
                f"'{self._name}' made this update in the backward pass, with {self._factor:g} "
                f"times the learning rate and no clipping, not {lr:g} and {max_grad_norm}"
            )
        return None

    def discard(self) -> None:
        """Raises OutOfMemory: an update that was begun can be neither undone nor split."""
        raise OutOfMemory(
            f"out of memory, and '{self._name}' may have updated some parameters already, so the "
            "update cannot be repeated in smaller micro-batches; lower loop.micro_batch_size "
            "together with loop.global_batch_size, or loop.max_length, and begin anew or --resume "
            "from the last checkpoint"
        )
