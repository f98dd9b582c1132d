"""What the engines have in common that fill DeepSpeed's buffers for a plan, at every stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lowres.core.engine import Engine


class PlannedEngine:
    """The engine over an optimizer that holds what DeepSpeed's holds."""

    keeps_gradients = False
    last_differs = True  # what becomes of gradients is told after the last pass
    _held: Any

    def __init__(self, inner: Engine) -> None:
        self.accelerator, self.learner = inner.accelerator, inner.learner
        self.optimizer = inner.optimizer
        self._held = getattr(inner.optimizer, "optimizer", inner.optimizer)
        self._last = True

    def buffers(self) -> Iterator[tuple[torch.Tensor, str]]:
        yield from self._held.buffers()

    def begin(self, lr: float) -> None:
        pass

    def passes(self) -> Iterator[contextlib.AbstractContextManager[Any]]:
        yield contextlib.nullcontext()

    def discard(self) -> None:
        raise NotImplementedError("a plan discards nothing")


def copied_to_save(
    model: Any, parameters: Sequence[torch.nn.Parameter]
) -> list[torch.nn.Parameter]:
    """Those of one storage that transformers and PEFT copy while the model is saved."""
    if hasattr(model, "peft_config"):
        return list(parameters[1:])
    named = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    return [p for p in parameters if named.count(id(p)) == 1]  # tied ones are left out instead
