"""How an update is made from micro-batches. Default: back-propagation through accelerate."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from lowres.core.errors import Diverged

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.learner import Learner


class Accelerator(Protocol):
    """What lowres uses of `accelerate.Accelerator`."""

    num_processes: int
    process_index: int
    is_main_process: bool
    device: torch.device

    def backward(self, loss: torch.Tensor) -> None: ...
    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]: ...
    def clip_grad_norm_(self, parameters: Any, max_norm: float) -> Any: ...
    def autocast(self) -> contextlib.AbstractContextManager[Any]: ...
    def wait_for_everyone(self) -> None: ...


class Engine(Protocol):
    """What a procedure drives: `begin`, then for each of `passes` every micro-batch through
    `accumulate`, then `update`. `learner` and `optimizer` are those that levers may have wrapped.

    Args:
        keeps_gradients: Whether the gradients of a micro-batch outlive its backward pass.
    """

    accelerator: Accelerator
    learner: Learner
    optimizer: torch.optim.Optimizer
    keeps_gradients: bool

    def begin(self, lr: float) -> None:
        """An update begins.

        Args:
            lr: The factor on every group's learning rate, as `update` is given it afterwards; 1 for
                an engine that was never told.
        """

    def passes(self) -> Iterator[contextlib.AbstractContextManager[Any]]:
        """How often the micro-batches of an update are gone through, each time in this context."""

    def accumulate(self, loss_sum: torch.Tensor, share: float, last: bool) -> None:
        """Add one micro-batch's gradients.

        Args:
            loss_sum: Sum of the loss over the micro-batch's targets.
            share: What makes the sum a mean over the global batch.
            last: Whether this is the update's last micro-batch, after which processes synchronise.
        """

    def update(self, lr: float, max_grad_norm: float | None) -> float | None:
        """Clip, step, clear. Returns the gradient norm before clipping,
        None where none was computed.
        """

    def discard(self) -> None:
        """Forget the gradients collected since the last update."""


class BackPropagation:
    """Plain back-propagation; gradients live until the update."""

    keeps_gradients = True

    def __init__(
        self, accelerator: Accelerator, learner: Learner, optimizer: torch.optim.Optimizer
    ) -> None:
        self.accelerator = accelerator
        self.learner = learner
        self.optimizer = optimizer
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._trained = [p for group in optimizer.param_groups for p in group["params"]]

    def begin(self, lr: float) -> None:
        for group, base in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = base * lr

    def passes(self) -> Iterator[contextlib.AbstractContextManager[Any]]:
        yield contextlib.nullcontext()

    def accumulate(self, loss_sum: torch.Tensor, share: float, last: bool) -> None:
        # accelerate's data parallelism averages over processes; the sum is wanted.
        scale = share * self.accelerator.num_processes
        hold = contextlib.nullcontext() if last else self.accelerator.no_sync(self.learner.module)
        with hold:
            self.accelerator.backward(loss_sum * scale)

    def update(self, lr: float, max_grad_norm: float | None) -> float | None:
        self.begin(lr)
        norm = None
        if max_grad_norm is not None:
            norm = float(self.accelerator.clip_grad_norm_(self._trained, max_grad_norm))
            # Under float16 the loss scaler skips such an update and lowers its scale.
            if not math.isfinite(norm) and getattr(self.accelerator, "scaler", None) is None:
                raise Diverged(
                    f"the gradient norm is {norm}; lower optimizer.lr, or compute in a wider type "
                    "(loop.precision, model.dtype)"
                )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
