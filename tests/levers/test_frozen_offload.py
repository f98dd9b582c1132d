"""Frozen weights that stream: equal results, the bytes of two blocks, the plan of a card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lowres
from lowres.bridges.streaming import streamed_tensors
from lowres.core.errors import InputError
from lowres.run.build import build
from lowres.run.plan import plan
from tests.conftest import KINDS

TINY = {"checkpoint": "package:lowres/assets/tiny_lm"}
LORA = {"name": "lora", "targets": "all-linear"}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"method": LORA},
    "recomputed": {"method": LORA, "before": ["gradient_checkpointing"]},
    "4 bits": {"method": LORA, "before": ["nf4_weights"]},
    "4 bits, recomputed after": {
        "method": LORA, "before": ["nf4_weights"], "after": ["gradient_checkpointing"],
    },
    "frozen prefix": {"freezing": {"name": "prefix", "frozen": 2}},
    "autocast": {"method": LORA, "loop": {"precision": "bf16"}},
}  # fmt: skip


def changed(variant: str, lever: list[Any]) -> dict[str, Any]:
    changes = dict(VARIANTS[variant])
    return (
        changes
        | {"levers": [*changes.pop("before", []), *lever, *changes.pop("after", [])]}
        | {k: v for k, v in changes.items() if k not in ("before", "after")}
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_planned_bytes_are_measured_bytes_and_the_run_is_the_same(
    variant: str, kind: str, recipe: Callable[..., Any], in_folder: Any
) -> None:
    """Reference: the run on the CPU, to the byte; its losses and scores without the lever, exactly.
    A copy of a weight is multiplied with as the weight is."""
    keys = {k: v for k, v in changed(variant, ["frozen_offload"]).items() if k in KEYS}
    plain = {k: v for k, v in changed(variant, []).items() if k in KEYS}
    record = lowres.run(recipe(kind, **keys), quiet=True)
    assert record.plan is not None, record.events
    for phase in ("first_step", "steady_steps", "evaluate"):
        planned = record.plan["phases"][phase]["live_bytes"]
        assert planned == record.measured.phases[phase].live_bytes, phase
    without = lowres.run(recipe(kind, **plain), quiet=True)
    assert record.losses == without.losses
    assert [s.value for s in record.scores] == [s.value for s in without.scores]


KEYS = ("method", "freezing", "loop", "levers")
