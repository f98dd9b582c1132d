"""What the tensors that an update leaves behind are, for the plan's categories."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lowres.core.engine import Engine
from lowres.core.example import Batch
from lowres.core.learner import Learner
from lowres.memory.trace import OUTSIDE
from lowres.memory.tracer import Tracer


class Categories:
    """Tells a tracer of batches, gradients and optimizer states."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def name(self, tensor: Any, category: str) -> None:
        """Tell of one tensor; nothing where it is none or not traced."""
        number = self._tracer.number(tensor) if isinstance(tensor, torch.Tensor) else None
        if number is not None:
            self._tracer.trace.births[number].category = category

    def batches(self, batches: Sequence[Batch], numbers: Iterable[int]) -> None:
        for number in numbers:
            self._tracer.hold((t, OUTSIDE, "", "batch") for t in batches[number].values())
            for tensor in batches[number].values():
                self.name(tensor, "batch")

    def gradients(self, learner: Learner) -> None:
        for parameter in learner.base.parameters():
            self.name(parameter.grad, "gradients")

    def put_gradients(self, learner: Learner) -> None:
        """Give every trained parameter a gradient, without a backward pass."""
        self._tracer.enter("gradients")
        for parameter in learner.base.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        self.gradients(learner)
        self._tracer.enter("forward")

    def states(self, engine: Engine) -> None:
        for state in engine.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor) and self._tracer.number(value) is None:
                    # Made before the steps, such as the code books of 8-bit states.
                    self._tracer.hold([(value, OUTSIDE, "", "optimizer states")])
                self.name(value, "optimizer states")
