"""Every method that goes with packed weights, planned over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import lowres
from lowres.core import registry
from tests.conftest import sample_part, sampled

PAIRS = [
    (method, form)
    for method in registry.names("method")
    for form in registry.load("method", method).few_bits()  # type: ignore[attr-defined]
]


@pytest.mark.parametrize("pair", sampled(PAIRS, every=9), ids=lambda pair: " over ".join(pair))
def test_updates_over_packed_weights_are_planned(
    pair: tuple[str, str], recipe: Callable[..., Any], in_folder: Any
) -> None:
    """Reference: live bytes of a run. Where fish_mask's entries lie, which data decide, is not
    foreseen: it may need less."""
    method, form = pair
    one = recipe(
        method=sample_part("method", method), levers=[f"{form}_weights"], objective="label_words"
    )
    record = lowres.run(one, quiet=True)
    assert record.plan is not None, record.events
    for phase in ("first_step", "steady_steps"):
        planned = record.plan["phases"][phase]["live_bytes"]
        measured = record.measured.phases[phase].live_bytes  # type: ignore[index]
        assert measured is not None, phase
        if method == "fish_mask":
            assert planned >= measured, phase
        else:
            assert planned == pytest.approx(measured, rel=0.01), phase
