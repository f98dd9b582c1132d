"""Checks of a run that would else fail without a word: is what should be trained trained, and
nothing else?

`gradients`: in the first two updates every trained parameter has a finite gradient. `moved`: after
them every trained parameter has another value. `frozen`: the bytes of what is frozen have the same
sums at the end. `saved`: what was trained lies bit for bit, under its name, in the files that were
written. `rounding` is a remark: most weights of 16 bits stayed as they were.

A part names the guards that cannot hold for it in `waives`. All work on sums of integers over the
bytes that are there: nothing is copied, and nothing is read while memory or time are measured but
one norm of each gradient in the first two updates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowres.bridges import deepspeed
from lowres.bridges.bitsandbytes import quantisation_states
from lowres.core.errors import Diverged, GuardFailed, some
from lowres.core.parts import Guard
from lowres.core.recipe import Recipe
from lowres.run.checksums import checksum, fingerprint
from lowres.run.rounding import Rounding
from lowres.run.written import stop_at_lost

UPDATES = 2
"""After so many every trained parameter has moved: LoRA's A has a zero gradient in the first."""


class Guards:
    """The checks of one run in one process.

    Args:
        model: The learner's base.
        optimizer: What updates it.
        event: Notes what is odd and no failure, as `Session.event`.
        keeps_gradients: Whether they are there before an update, as `Engine.keeps_gradients`.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        event: Callable[[str, str], None],
        keeps_gradients: bool = True,
    ) -> None:
        parts = (recipe.method, recipe.freezing, recipe.objective, recipe.optimizer,
                 recipe.procedure, *recipe.levers)  # fmt: skip
        self._waived: frozenset[Guard] = frozenset().union(*(p.waives for p in parts))
        self._model, self._optimizer, self._event = model, optimizer, event
        self._may_rest = recipe.method.may_rest
        self._moved: set[str] = set()
        self._rates: dict[str, float] = {}
        self._largest: dict[str, float] = {}
        """Of each trained parameter's gradients so far."""
        self._updates = 0
        self._ever: list[str] = []
        self._divided = deepspeed.is_divided(optimizer)
        # DeepSpeed holds float32 copies of what it updates.
        rate = 0.0 if self._divided else float(getattr(recipe.optimizer, "lr", 0.0))
        self._rounding = Rounding(model, optimizer, rate, event)
        self._told = self._divided or not keeps_gradients
        self._arrived: dict[str, float] = {}
        """The largest of the gradients as they came: DeepSpeed takes them away, and updates within
        the backward pass free them."""
        self._hooks: list[Callable[[], None]] = []
        self._trained: dict[str, int] = {}
        self._frozen: dict[str, tuple[int, int]] = {}

    def begin(self) -> None:
        """Remember what is there before the first update.

        Raises:
            GuardFailed: When a trained parameter is not in the optimizer.
        """
        rates = {id(p): g["lr"] for g in self._optimizer.param_groups for p in g["params"]}
        trained = dict(_trained(self._model))
        self._ever = list(trained)
        if "moved" not in self._waived:
            missing = [name for name, p in trained.items() if id(p) not in rates]
            if missing and not self._divided:
                text = (
                    f"the optimizer does not hold {some(missing)}, which would never be updated; "
                )
                raise GuardFailed(
                    text + "this is a mistake in a part of the recipe, not in its values"
                )
            self._trained = {
                name: _sum_of(p) for name, p in trained.items()
                if name.rpartition(".")[2] != self._may_rest
            }  # fmt: skip
        if self._told and "gradients" not in self._waived:
            for name, parameter in trained.items():
                came = functools.partial(self._arrive, name)
                hook = parameter.register_hook(came)  # type: ignore[no-untyped-call]
                self._hooks.append(hook.remove)
        if "frozen" not in self._waived:
            self._frozen = dict(_frozen_sums(self._model))
        self._rounding.begin()

    @property
    def watching(self) -> bool:
        """Whether updates are still looked at."""
        return self._updates < UPDATES

    def gradients(self, scaler: Any) -> None:
        """Look at the gradients of one update before it is made, or when it was made among them.

        Args:
            scaler: float16's loss scaler, whose scale they carry, and whose first scales overflow
                by design; None without one.

        Raises:
            GuardFailed: When a trained parameter has none.
            Diverged: When one is not finite.
        """
        if "gradients" in self._waived or not self.watching:
            return
        missing, infinite = [], []
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        for name, parameter in _trained(self._model):
            if self._told:
                largest = self._arrived.pop(name, None)
            else:
                largest = None if parameter.grad is None else _largest(parameter.grad)
            if largest is None:
                missing.append(name)
            elif not math.isfinite(largest):
                infinite.append(name)
            else:
                self._largest[name] = max(largest / scale, self._largest.get(name, 0.0))
        if missing:
            raise GuardFailed(
                f"no gradient reaches {some(missing)}: the loss does not depend on them, or the "
                "backward pass ends before them; freeze them, or drop the part that cuts it off"
            )
        if infinite and scaler is None:
            raise Diverged(
                f"the gradients of {some(infinite)} are not finite in update {self._updates + 1}; "
                "lower optimizer.lr, or compute in a wider type (loop.precision, model.dtype)"
            )

    def _arrive(self, name: str, gradient: torch.Tensor) -> None:
        both = _largest(gradient), self._arrived.get(name, 0.0)
        self._arrived[name] = max(both) if all(map(math.isfinite, both)) else math.inf

    def updated(self, skipped: bool) -> None:
        """Tell that an update was made; after the second one, look at what has moved since then or
        in the first: a method may set back what it trains.

        An update that float16's loss scaler skipped, or with a learning rate of 0 (the first of a
        warm-up), does not count.

        Raises:
            GuardFailed: When a trained parameter has its old value.
        """
        rates = {id(p): float(g["lr"]) for g in self._optimizer.param_groups for p in g["params"]}
        # DeepSpeed's optimizer holds parts of parameters, in stage 3 none between updates.
        usual = max(float(g["lr"]) for g in self._optimizer.param_groups) if self._divided else 0.0
        if not skipped:
            self._rounding.updated(max((usual, *rates.values())))
        if skipped or not self.watching or not any((usual, *rates.values())):
            return
        there = dict(_trained(self._model))
        for name, parameter in there.items():
            self._rates[name] = max(self._rates.get(name, 0.0), rates.get(id(parameter), usual))
        self._updates += 1
        # What rested meanwhile, or has just come in, has made too few updates to tell.
        self._trained = {n: was for n, was in self._trained.items() if n in there}
        self._moved |= {n for n, was in self._trained.items() if _sum_of(there[n]) != was}
        if self.watching:
            return
        for remove in self._hooks:
            remove()
        if "moved" in self._waived:
            return
        still = [name for name in self._trained if name not in self._moved]
        small = [n for n in still if self._is_small(n, there[n], _largest_of(there[n]))]
        if still and (len(still) == len(self._trained) or len(small) < len(still)):
            named = [n for n in still if n not in small] or still
            raise GuardFailed(
                f"after {UPDATES} updates {some(named)} of {len(self._trained)} trained "
                "parameters have not changed at all; raise optimizer.lr if it is tiny, else freeze "
                "them or drop the part that keeps them from learning"
            )
        if small:
            self._event(
                "moved",
                f"updates too small for the type that holds them left {some(small)} as they were; "
                "raise optimizer.lr, or hold them in float32 (model.dtype)",
            )

    def end(self) -> None:
        """Compare what is frozen with what it was at the beginning.

        Raises:
            GuardFailed: When its bytes have changed.
        """
        now = dict(_frozen_sums(self._model)) if self._frozen else {}
        changed = [name for name, was in self._frozen.items() if now.get(name, was) != was]
        if changed:
            raise GuardFailed(
                f"{some(changed)} should be frozen and changed while training; what was saved "
                "does not describe the model that was scored"
            )

    def saved(self, folder: Path) -> None:
        """Compare what was written with what was trained, which is whole in this process.

        Raises:
            GuardFailed: When a trained tensor is not in the files, bit for bit.
        """
        if "saved" not in self._waived:
            own = dict(self._model.named_parameters())
            stop_at_lost(self._model, folder, [(name, own[name]) for name in self._ever])

    def _is_small(self, name: str, parameter: nn.Parameter, held: float) -> bool:
        """Whether an update may be lost in rounding: by its size, or as 16 bits lose most."""
        largest, rate = self._largest.get(name), self._rates[name]
        if largest == 0:
            return False
        if parameter.element_size() < 4:
            return True
        if largest is None:
            return False  # without gradients the rule itself adds noise, which float32 holds
        # Update rules move by the rate times the gradient, or by the rate.
        return rate * min(largest, 1.0) < torch.finfo(parameter.dtype).eps * held


def _sum_of(parameter: nn.Parameter) -> int:
    with deepspeed.whole(parameter):
        return checksum(parameter)


def _largest_of(parameter: nn.Parameter) -> float:
    with deepspeed.whole(parameter):
        return _largest(parameter)


def _largest(tensor: torch.Tensor) -> float:
    """The largest magnitude: not finite where any element is not, and no copy is made."""
    return float(torch.linalg.vector_norm(tensor.detach(), math.inf))


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    named = model.named_parameters()
    return ((n, p) for n, p in named if p.requires_grad and deepspeed.elements(p))


def _frozen_sums(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Every frozen parameter that is at hand, and what quantised layers hold beside them."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or parameter.is_meta or not deepspeed.elements(parameter):
            continue
        with deepspeed.whole(parameter):
            sums = fingerprint(parameter)
        yield name, sums
    for number, (path, tensor) in enumerate(quantisation_states(model)):
        yield f"quantisation state {number} of {path}", fingerprint(tensor)
