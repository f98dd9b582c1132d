"""Compare the loss at two perturbed weights and step along the perturbation: forward passes only.

Paper: Fine-Tuning Language Models with Just Forward Passes, Malladi et al. 2023.
https://arxiv.org/abs/2305.17333

Departs from the paper: weights are restored after each of the two passes (four perturbations in
place instead of three), so a pass that runs out of memory leaves them as they were; dropout stays
on, the same in both passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lowres.core.errors import InputError, Problem
from lowres.core.parts import Circumstance, Guard, Optimizer, PositiveFloat, part
from lowres.optimizers._decay import groups

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.engine import Accelerator, Engine
    from lowres.core.learner import Learner
    from lowres.core.recipe import Recipe


@part
class Mezo(Optimizer):
    """No gradients, no states; one draw of the largest parameter's size at a time.

    The perturbation is drawn anew from the update's own seed whenever it is needed. Adding it and
    taking it off leaves each weight within two roundings of its type.

    Args:
        lr: Peak learning rate; the schedule scales it. The paper: 1e-7 to 1e-6 for full tuning.
        eps: Size of the perturbation.
        weight_decay: Of matrices; biases, norm weights and entries kept as a list are not decayed.
    """

    brings: ClassVar[frozenset[Circumstance]] = frozenset({"without_gradients"})
    waives: ClassVar[frozenset[Guard]] = frozenset({"gradients"})
    sample_fields: ClassVar[Mapping[str, Any]] = {"lr": 1e-3}
    refuses: ClassVar[Mapping[Literal["in_backward", "on_host", "divided"], str]] = {
        "in_backward": "has no backward pass; drop the lever",
        "on_host": "has no states to keep there; drop the lever",
        "divided": "has two passes and no gradients; use adamw with this lever",
    }

    lr: PositiveFloat
    eps: PositiveFloat = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0

    def check(self, recipe: Recipe) -> Iterator[str]:
        if recipe.loop.max_grad_norm is not None:
            yield (
                f"it has no gradients that loop.max_grad_norm {recipe.loop.max_grad_norm:g} could "
                "clip; set loop.max_grad_norm to null"
            )
        if recipe.loop.precision == "fp16":
            yield "loss scaling (loop.precision fp16) is for gradients; set it to bf16 or no"

    def make(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(groups(parameters, self.weight_decay), lr=self.lr, foreach=False)

    def engine(
        self, accelerator: Accelerator, learner: Learner, optimizer: torch.optim.Optimizer
    ) -> Engine:
        if accelerator.num_processes > 1:
            text = (
                f"'{self.name}' draws one perturbation, and {accelerator.num_processes} processes "
                "would draw as many; run one process"
            )
            raise InputError("the recipe", [Problem("optimizer", text)])
        return TwoPasses(accelerator, learner, optimizer, self.eps)


class TwoPasses:
    """The engine: the weights are perturbed in the contexts of its two passes.

    The optimizer holds groups and learning rates; its own rule is not used.
    """

    keeps_gradients = False

    def __init__(
        self,
        accelerator: Accelerator,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        eps: float,
    ) -> None:
        self.accelerator, self.learner, self.optimizer = accelerator, learner, optimizer
        self._eps = eps
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._sign, self._difference, self._seed = 1, 0.0, 0

    def begin(self, lr: float) -> None:
        for group, base in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = base * lr

    def passes(self) -> Iterator[contextlib.AbstractContextManager[Any]]:
        self._difference = 0.0
        for sign in (1, -1):
            yield self._perturbed(sign)

    @contextlib.contextmanager
    def _perturbed(self, sign: int) -> Iterator[None]:
        import torch

        # That of the update, set before each of its passes: nothing is left for a checkpoint.
        self._sign, self._seed = sign, torch.initial_seed()
        with torch.no_grad():
            self._move(lambda _: sign * self._eps)
            try:
                yield
            finally:
                self._move(lambda _: -sign * self._eps)

    def accumulate(self, loss_sum: torch.Tensor, share: float, last: bool) -> None:
        self._difference += self._sign * float(loss_sum) * share

    def update(self, lr: float, max_grad_norm: float | None) -> float | None:
        import torch

        self.begin(lr)
        slope = self._difference / (2 * self._eps)
        with torch.no_grad():
            for group in self.optimizer.param_groups:
                if group["weight_decay"]:
                    for parameter in _active(group):
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])
            self._move(lambda group: -group["lr"] * slope)
        return None

    def discard(self) -> None:
        self._difference = 0.0

    def _move(self, far: Any) -> None:
        """Add the perturbation times `far(group)` to every parameter, one after the other."""
        import torch

        generator = torch.Generator(self.accelerator.device).manual_seed(self._seed)
        for group in self.optimizer.param_groups:
            for p in _active(group):
                z = torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)
                p.add_(z, alpha=far(group))
                del z


def _active(group: dict[str, Any]) -> Iterator[nn.Parameter]:
    """Those that train in this update; others rest while blocks rotate."""
    return (p for p in group["params"] if p.requires_grad)
