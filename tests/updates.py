"""Two real updates of a recipe, and how far two recipes' updates are apart."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import pytest
import torch

from lowres.bridges import accelerate
from lowres.making.build import build, engine_of
from lowres.making.gradients import make_gradients, micro_batches
from lowres.memory.held import held
from lowres.memory.live import LiveBytes

# With a large eps an update is nearly proportional to its gradient: AdamW's first ones are else
# signs, which rounding turns over.
# At a rate of 1 the first update of all weights drives BERT's attention to where the gradient of
# its queries cancels: float32 is then 4e-5 off float64 there, with or without a lever.
SMOOTH = {"name": "adamw", "lr": 0.3, "eps": 1.0}
SEEN = 10
"""How many times a tensor's change has to be what rounding may hide: what an update does wrong is
seen, and what its gradient has wrong is compared by itself."""


UNIT = 2.0**-24
"""Float32's largest relative error of one operation."""
TOLERANCE = 8 * 32 * UNIT
"""Relative, of a tensor's gradient (Frobenius): the bound for a sum over an update's tokens, 8 rows
of at most 32, that is taken in another order. What is further off is computed again in float64 on
both sides and held to the same: a sum may cancel (one gate's bias; the scale of all of a drawn
space), and is then only as exact as its terms are."""
ROUNDED = 4 * UNIT
"""Relative to a tensor: what a change read off its values may lose where two runs of two updates
each round it."""
BLIND = re.compile(r"\b(k|key|k_proj)\.(.*\.)?bias$")
"""Attention is blind to a bias of all keys: the sum of its gradient vanishes but for rounding."""


def prepared(one: Any, double: bool = False) -> tuple[Any, Any, Any, Any]:
    """Accelerator, what is built, learner and engine, as a run begins."""
    accelerator = accelerate.make(one)
    built = build(one)
    if double:
        built.model.double()
    module, optimizer = accelerator.prepare(built.model, built.optimizer)
    learner = dataclasses.replace(built.learner, module=module)
    engine = engine_of(one, accelerator, learner, optimizer)
    learner.base.train()
    return accelerator, built, learner, engine


def peak_bytes(one: Any) -> int:
    """The peak of live bytes of the second of two real updates, each of two micro-batches."""
    accelerator, built, learner, engine = prepared(one)
    for step in range(2):
        rows = built.train_rows[8 * step : 8 * step + 8]
        batches = micro_batches(one, learner, rows, one.loop.micro_batch_size)
        with LiveBytes("cpu", held(learner.base, engine.optimizer)) as counted:
            make_gradients(one.objective, learner, engine, accelerator, batches, 0)
            engine.update(1.0, one.loop.max_grad_norm)
    return counted.peak_bytes


@dataclasses.dataclass
class Updates:
    """Of two real updates, each of two micro-batches: losses, gradients, weights before and after.

    Gradients are summed over micro-batches in float64 as they arrive at the weights, so that they
    are seen where a lever lets go of them within the backward pass.
    """

    losses: list[float]
    gradients: list[dict[str, torch.Tensor]]
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]

    def change(self, name: str) -> torch.Tensor:
        return self.after[name].double() - self.before[name].double()

    def rounded(self, name: str) -> float:
        """What of a change is lost where it is read off the values."""
        return ROUNDED * float(self.after[name].norm())


def two_updates(one: Any, double: bool = False) -> Updates:
    """In float32, or in float64 from the same weights."""
    accelerator, built, learner, engine = prepared(one, double)
    trained = {n: p for n, p in learner.base.named_parameters() if p.requires_grad}
    # Away from where methods begin, at which one factor's gradient vanishes as the other is zero.
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=drawn)
    found = Updates([], [], {n: p.detach().clone() for n, p in trained.items()}, {})

    def add(gradient: torch.Tensor, name: str) -> None:
        found.gradients[-1][name] += gradient.detach()

    for name, parameter in trained.items():
        parameter.register_hook(functools.partial(add, name=name))
    for step in range(2):
        found.gradients.append({n: torch.zeros_like(p).double() for n, p in trained.items()})
        rows = built.train_rows[8 * step : 8 * step + 8]
        batches = micro_batches(one, learner, rows, one.loop.micro_batch_size)
        loss, _, _ = make_gradients(one.objective, learner, engine, accelerator, batches, 0)
        engine.update(1.0, one.loop.max_grad_norm)
        found.losses.append(loss)
    found.after = {n: p.detach() for n, p in trained.items()}
    return found


def apart(plain: Updates, pulled: Updates, name: str) -> float:
    """How far the gradients and the change of a tensor are apart, in tolerances."""
    far = []
    for wanted, found in zip(plain.gradients, pulled.gradients, strict=True):
        scale = float((one_vector(wanted) if BLIND.search(name) else wanted[name]).norm())
        off = float((found[name] - wanted[name]).norm())
        far.append(off / (TOLERANCE * scale) if off else 0.0)
    change = plain.change(name)
    off = float((pulled.change(name) - change).norm())
    allowed = TOLERANCE * float(change.norm()) + plain.rounded(name)
    return max(*far, off / allowed if off else 0.0)


def compare(one: Any, other: Any) -> None:
    """Two updates of each: equal losses, gradients and changes of every trained tensor."""
    plain, pulled = two_updates(one), two_updates(other)

    @functools.cache
    def wide() -> tuple[Updates, Updates]:
        return two_updates(one, double=True), two_updates(other, double=True)

    assert pulled.losses == pytest.approx(plain.losses, rel=TOLERANCE)
    assert pulled.after.keys() == plain.after.keys()
    moved = 0
    for name in plain.before:
        assert torch.equal(pulled.before[name], plain.before[name]), name
        off = apart(plain, pulled, name)
        if off > 1:
            off = apart(*wide(), name)
        assert off <= 1, (name, off)
        if any(bool(g[name].any()) for g in plain.gradients) and not BLIND.search(name):
            size = float(plain.change(name).norm())
            assert size > SEEN * plain.rounded(name), f"{name}: {size} would not be seen"
            moved += 1
    assert moved


def one_vector(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([found[name].flatten() for name in sorted(found)])
