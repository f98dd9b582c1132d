"""AdamW against its paper's algorithm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowres.core import registry
from lowres.optimizers._decay import decays

ADAMW = registry.load("optimizer", "adamw")


@pytest.mark.parametrize("implementation", ["fused", "foreach", "loop"])
def test_ten_updates_equal_algorithm_2_of_the_paper(implementation: str) -> None:
    """Reference: Loshchilov and Hutter, algorithm 2, by hand in float64; a matrix is decayed, a
    vector is not. Tolerance: the order of float64 operations."""
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    vector = nn.Parameter(torch.randn(3, dtype=torch.float64))
    lr, (b1, b2), eps, decay = 0.1, (0.8, 0.95), 1e-6, 0.3
    optimizer = ADAMW(
        lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay, implementation=implementation
    ).make([("m", matrix), ("v", vector)])
    expected = [p.detach().clone() for p in (matrix, vector)]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in expected]
    for step in range(1, 11):
        ((matrix**2).sum() + (vector**3).sum()).backward()
        gradients = [2 * expected[0], 3 * expected[1] ** 2]
        for i, (gradient, decayed) in enumerate(zip(gradients, (decay, 0.0), strict=True)):
            first, second = moments[i]
            first.mul_(b1).add_((1 - b1) * gradient)
            second.mul_(b2).add_((1 - b2) * gradient**2)
            rate = (first / (1 - b1**step)) / ((second / (1 - b2**step)).sqrt() + eps)
            expected[i] = expected[i] - lr * (rate + decayed * expected[i])
        optimizer.step()
        optimizer.zero_grad()
    assert torch.allclose(matrix, expected[0], rtol=1e-9)
    assert torch.allclose(vector, expected[1], rtol=1e-9)


def test_its_states_are_two_tensors_a_parameter() -> None:
    """Closed form: 8 bytes for each float32 parameter and a counter of 4 bytes."""
    parameter = nn.Parameter(torch.ones(10, 4))
    optimizer = ADAMW(lr=1e-3).make([("w", parameter)])
    parameter.sum().backward()
    optimizer.step()
    states = [v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor)]
    assert sum(v.nbytes for v in states) == 2 * 40 * 4 + 4


@pytest.mark.parametrize(
    ("shape", "decayed"),
    [
        ((4, 3), True),
        ((4,), False),
        ((), False),
        ((4, 1), False),
        ((1, 4), False),
        ((2, 3, 1), True),
    ],
)
def test_scales_are_not_decayed_however_they_are_held(
    shape: tuple[int, ...], decayed: bool
) -> None:
    """Behaviour: those of (IA)^3 are columns, and 1 changes nothing there."""
    assert decays(nn.Parameter(torch.ones(shape))) == decayed
