"""Matrices in 16 bits in a model of float32: what they are, what they refuse, what they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lowres
from lowres.bridges import narrow
from lowres.core.errors import InputError
from lowres.memory.live import LiveBytes
from lowres.run.build import build
from tests.conftest import KINDS

LEVERS = {"bf16_weights": torch.bfloat16, "fp16_weights": torch.float16}


@pytest.mark.parametrize("lever", LEVERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", ["classification", "label_words"])
def test_matrices_take_two_bytes_and_everything_else_keeps_its_type(
    objective: str, kind: str, lever: str, recipe: Callable[..., Any]
) -> None:
    """Closed form: by the shape and the name of each parameter, and each value rounded once."""
    plain = build(recipe(kind, method="lora", objective=objective)).model
    built = build(recipe(kind, method="lora", objective=objective, levers=[lever]))
    before = dict(plain.named_parameters())
    narrowed = 0
    for name, parameter in built.model.named_parameters():
        made_here = "lora_" in name or any(
            f".{head}." in name for head in built.learner.blocks.head
        )
        matrix = parameter.dim() == 2 and not made_here and ".wo." not in name
        assert parameter.dtype == (LEVERS[lever] if matrix else torch.float32), name
        if not made_here:
            assert torch.equal(parameter, before[name].to(parameter.dtype)), name
        narrowed += matrix
    assert narrowed > 10
    assert built.model.config.dtype == torch.float32


@pytest.mark.parametrize(
    "method, lever", [("full", "bf16_weights"), ("lora", "bf16_weights"), ("lora", "fp16_weights")]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_trains_and_is_planned_to_the_byte(
    precision: str, kind: str, method: str, lever: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Reference: the live bytes of the real run."""
    one = recipe(kind, method=method, levers=[lever], loop={"precision": precision})
    record = lowres.run(one, output_folder=tmp_path / "out", quiet=True)
    assert record.outcome == "ok" and record.plan is not None, record.events
    for phase in ("first_step", "steady_steps", "evaluate"):
        planned = record.plan["phases"][phase]["live_bytes"]
        assert planned == record.measured.phases[phase].live_bytes, phase  # type: ignore[index]
