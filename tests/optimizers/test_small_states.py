"""Optimizers with few states or none: their equations, bytes, plans, resuming, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowres
from lowres.core import registry
from lowres.core.errors import InputError, LowresError
from tests.conftest import sampled

LOOP = {"micro_batch_size": 8, "max_grad_norm": None}
FIELDS: dict[str, dict[str, Any]] = {
    "adafactor": {"lr": 1e-2},
    "galore": {"lr": 1e-3, "rank": 4, "interval": 2},
    "apollo": {"lr": 1e-3, "rank": 4, "interval": 2},
    "lomo": {"lr": 1e-2},
    "mezo": {"lr": 1e-4},
}


def trained(name: str, shape: tuple[int, ...], steps: int, **fields: Any) -> tuple[Any, ...]:
    """Start, gradients, the parameter after the steps, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(steps)]
    p = nn.Parameter(start.clone())
    optimizer = registry.load("optimizer", name)(**FIELDS[name] | fields).make([("w", p)])
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return start, gradients, p, optimizer


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_adafactor_follows_the_papers_algorithm(shape: tuple[int, int]) -> None:
    """Reference: algorithms 4 and 5 of the paper written out, with the step size given."""
    w, gradients, p, _ = trained("adafactor", shape, 5)
    rows, columns = torch.zeros(shape[0]), torch.zeros(shape[1])
    for t, g in enumerate(gradients, start=1):
        beta = 1 - t**-0.8
        alpha = max(1e-3, float(w.square().mean().sqrt())) * 1e-2
        rows = beta * rows + (1 - beta) * (g**2 + 1e-30).sum(1)
        columns = beta * columns + (1 - beta) * (g**2 + 1e-30).sum(0)
        u = g / (torch.outer(rows, columns) / rows.sum()).sqrt()
        w = w - alpha * u / max(1.0, float(u.square().mean().sqrt()))
    assert torch.allclose(p, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_galore_follows_the_papers_algorithm(shape: tuple[int, int]) -> None:
    """Reference: algorithm 2 of the paper, with matrices turned so that rows are the short side."""
    w, gradients, p, _ = trained("galore", shape, 5)
    turned = shape[0] > shape[1]
    m = v = torch.zeros(4, 9)
    onto = torch.empty(0)
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.t() if turned else gradient
        if (t - 1) % 2 == 0:
            # Singular vectors have no sign of their own, and moments outlive a projection.
            left, _, right = torch.linalg.svd(gradient)
            onto = right[:4].t() if turned else left[:, :4]
        r = onto.t() @ g
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r**2
        n = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        change = 0.25 * onto @ n
        w = w - 1e-3 * (change.t() if turned else change)
    assert torch.allclose(p, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaling", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_apollo_follows_the_papers_algorithm(shape: tuple[int, int], scaling: str) -> None:
    """Reference: algorithm 1 of the paper with its limit on growing norms."""
    w, gradients, p, _ = trained("apollo", shape, 5, scaling=scaling)
    turned = shape[0] > shape[1]
    m = v = torch.zeros(4, 9)
    before = math.inf
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.t() if turned else gradient
        generator = torch.Generator().manual_seed((t - 1) // 2)
        r = torch.randn(6, 4, generator=generator).t() / math.sqrt(4) @ g
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r**2
        n = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        change = g * (
            n.norm(dim=0) / r.norm(dim=0) if scaling == "channel" else n.norm() / r.norm()
        )
        if change.norm() > 1.01 * before:
            change = change / change.norm() * 1.01 * before
        before = float(change.norm())
        w = w - 1e-3 * (change.t() if turned else change)
    assert torch.allclose(p, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adafactor", 4 * (6 + 9) + 4),
        ("galore", 4 * (2 * 4 * 9 + 4 * 6)),
        ("apollo", 4 * 2 * 4 * 9 + 4),
        ("lomo", 0),
        ("mezo", 0),
    ],
)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_states_take_the_bytes_that_are_said(
    shape: tuple[int, int], name: str, expected: int
) -> None:
    """Closed form, in float32: rows and columns; moments and projection of rank 4; nothing."""
    _, _, p, optimizer = trained(name, shape, 3)
    state = optimizer.state[p].values()
    assert sum(v.nbytes for v in state if isinstance(v, torch.Tensor)) == expected


def test_apollo_lets_a_matrix_start_whose_first_gradient_is_zero() -> None:
    """Behaviour: so is the gradient of an adapter's A while its B is 0."""
    p = nn.Parameter(torch.ones(6, 9))
    optimizer = registry.load("optimizer", "apollo")(**FIELDS["apollo"]).make([("w", p)])
    for scale in (0.0, 1.0):
        p.grad = torch.full_like(p, scale)
        optimizer.step()
    assert float((p.detach() - 1).abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["galore", "apollo"])
def test_small_matrices_tables_and_vectors_are_updated_by_adamw(name: str) -> None:
    """Reference: torch's AdamW."""
    for place, shape in (("w", (4, 9)), ("wte.weight", (9, 9)), ("b", (9,))):
        given = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
        fields = FIELDS[name] | {"weight_decay": 0.1 if place != "b" else 0.0}
        ours = registry.load("optimizer", name)(**fields).make([(place, given[0])])
        theirs = torch.optim.AdamW([given[1]], lr=1e-3, weight_decay=fields["weight_decay"])
        for seed in range(4):
            gradient = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            for p, optimizer in zip(given, (ours, theirs), strict=True):
                p.grad = gradient.clone()
                optimizer.step()
        assert torch.allclose(*given, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "method"), sampled([*FIELDS], ["full", "lora"], every=3))
def test_a_run_is_planned_to_the_byte_and_resumed_to_the_bit(
    name: str, method: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Reference: the measured bytes of a run on the CPU; the uninterrupted run."""
    make = lambda **budget: recipe(
        method=method, optimizer={"name": name} | FIELDS[name], budget=budget,
        loop=LOOP | {"save_every": 2},
    )  # fmt: skip
    whole = lowres.run(make(), output_folder=tmp_path / "a", quiet=True)
    assert whole.plan is not None, whole.events
    for phase in ("first_step", "steady_steps", "evaluate"):
        planned = whole.plan["phases"][phase]["live_bytes"]
        assert planned == whole.measured.phases[phase].live_bytes, phase  # type: ignore[index]
    with pytest.raises(LowresError):
        lowres.run(make(minutes=1e-6), output_folder=tmp_path / "b", quiet=True, plan=False)
    again = lowres.run(
        make(), output_folder=tmp_path / "b", resume="latest", quiet=True, plan=False
    )
    assert again.losses == whole.losses


def test_lomo_is_gradient_descent(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Reference: a loop of plain gradient steps over the same rows."""
    from lowres.making.build import build
    from lowres.making.gradients import make_gradients
    from tests.levers.test_optimizer_in_backward import prepared

    one = recipe(optimizer={"name": "lomo", "lr": 0.1}, loop=LOOP)
    other = build(recipe(loop=LOOP))
    other.model.train()
    built, learner, engine, accelerator = prepared(one)
    for factor in (0.5, 1.0):
        batch = built.collator(built.train_rows[:8])
        engine.begin(factor)
        make_gradients(one.objective, learner, engine, accelerator, [batch], 0)
        engine.update(factor, None)
        loss = one.objective.loss(other.learner, batch) / one.objective.targets(batch)
        trainable = [p for p in other.model.parameters() if p.requires_grad]
        for p, g in zip(trainable, torch.autograd.grad(loss, trainable), strict=True):
            p.data -= 0.1 * factor * g
    for (n, p), q in zip(learner.base.named_parameters(), other.model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), n


def test_mezo_steps_along_its_perturbation(recipe: Callable[..., Any]) -> None:
    """Reference: the slope along z from two losses at perturbed copies; two micro-batches. Restored
    weights are within two roundings."""
    import copy

    from lowres.making.gradients import make_gradients
    from tests.levers.test_optimizer_in_backward import prepared

    one = recipe(
        optimizer={"name": "mezo", "lr": 1e-2, "eps": 1e-2},
        loop={"micro_batch_size": 4, "max_grad_norm": None},
    )
    built, learner, engine, accelerator = prepared(one)
    start = copy.deepcopy(dict(learner.base.named_parameters()))
    batches = [built.collator(built.train_rows[i : i + 4]) for i in (0, 4)]
    engine.begin(1.0)
    make_gradients(one.objective, learner, engine, accelerator, batches, 7)
    now = dict(learner.base.named_parameters())
    for n, p in start.items():
        assert torch.allclose(now[n], p, rtol=1e-6, atol=4e-9), n
    generator = torch.Generator().manual_seed(7)
    order = [p for g in engine.optimizer.param_groups for p in g["params"]]
    z = {id(p): torch.randn(p.shape, generator=generator) for p in order}
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            for n, p in now.items():
                p.copy_(start[n] + sign * 1e-2 * z[id(p)])
            targets = sum(one.objective.targets(b) for b in batches)
            losses.append(sum(float(one.objective.loss(learner, b)) for b in batches) / targets)
        slope = (losses[0] - losses[1]) / 2e-2
        for n, p in now.items():
            p.copy_(start[n])
    engine.update(1.0, None)
    assert slope != 0
    for n, p in now.items():
        assert torch.allclose(p, start[n] - 1e-2 * slope * z[id(p)], rtol=1e-4, atol=1e-5), n


@pytest.mark.parametrize("name", ["lomo", "mezo"])
def test_clipping_and_levers_that_do_not_fit_are_refused(
    name: str, recipe: Callable[..., Any]
) -> None:
    """Behaviour: the reason and the nearest choice that works."""
    optimizer = {"name": name} | FIELDS[name]
    with pytest.raises(InputError, match="set loop.max_grad_norm to null"):
        recipe(optimizer=optimizer, loop={"micro_batch_size": 8})
    for lever in ("optimizer_in_backward", "optimizer_offload"):
        with pytest.raises(InputError, match="drop the lever"):
            recipe(optimizer=optimizer, loop=LOOP, levers=[{"name": lever}])
