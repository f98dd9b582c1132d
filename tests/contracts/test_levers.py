"""What every lever promises, without naming one: `exact` changes no loss and no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowres.core import registry
from lowres.memory.live import LiveBytes, tensors_of
from lowres.run.build import build
from tests.conftest import KINDS, sample_part

LEVERS = registry.names("lever")
METHODS = registry.names("method")
EXACT = [n for n in LEVERS if registry.load("lever", n).effect == "exact"]


def test_there_are_levers() -> None:
    """Behaviour: the listing is not empty, and each says whether it is exact."""
    assert LEVERS
    assert all(registry.load("lever", n).effect in ("exact", "lossy") for n in LEVERS)


def gradients(one: Any) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients and the peak of live bytes of one forward and backward pass
    in training mode.
    """
    built = build(one)
    built.model.train()
    batch = built.collator(built.train_rows[:8])
    with LiveBytes("cpu", tensors_of(built.model)) as counted:
        loss = one.objective.loss(built.learner, batch)
        loss.backward()
    found = {n: p.grad for n, p in built.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found, counted.peak_bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lever", EXACT)
def test_an_exact_lever_changes_no_gradient_and_lowers_the_peak(
    lever: str, method: str, kind: str, recipe: Callable[..., Any]
) -> None:
    """Reference: the same recipe without the lever; equal to float32 rounding."""
    from lowres.core.errors import InputError

    changes = {"method": sample_part("method", method), "freezing": "none"}
    try:
        loss, plain, peak = gradients(recipe(kind, **changes))
    except InputError as refusal:
        pytest.skip(f"refused: {refusal.problems[0].text}")
    pulled_loss, pulled, pulled_peak = gradients(
        recipe(kind, levers=[sample_part("lever", lever)], **changes)
    )
    assert pulled_loss == pytest.approx(loss, rel=1e-6)
    assert pulled.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.allclose(pulled[name], gradient, rtol=1e-5, atol=1e-7), name
    assert pulled_peak < peak
