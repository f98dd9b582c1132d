"""Matrices in 16 bits in a model of float32: what they are, what they refuse, what they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import lowres
from lowres.bridges import narrow
from lowres.core.errors import InputError, OutOfTime
from lowres.making.build import build
from lowres.memory.live import LiveBytes
from tests.conftest import KINDS, sampled

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
    ("pair", "kind", "precision"),
    sampled(
        [("full", "bf16_weights"), ("lora", "bf16_weights"), ("lora", "fp16_weights")],
        KINDS,
        ["no", "bf16"],
        every=7,
    ),
)
def test_a_run_trains_and_is_planned_to_the_byte(
    pair: tuple[str, str], kind: str, precision: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Reference: the live bytes of the real run."""
    method, lever = pair
    one = recipe(kind, method=method, levers=[lever], loop={"precision": precision})
    record = lowres.run(one, output_folder=tmp_path / "out", quiet=True)
    assert record.outcome == "ok" and record.plan is not None, record.events
    for phase in ("first_step", "steady_steps", "evaluate"):
        planned = record.plan["phases"][phase]["live_bytes"]
        assert planned == record.measured.phases[phase].live_bytes, phase  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_products_and_gradients_are_those_of_the_widened_weight(
    layer: str, dtype: torch.dtype
) -> None:
    """Reference: the plain layer over the rounded weight, bit for bit in float32; the gradient of a
    trained weight is rounded once. Under autocast to the same type nothing is widened."""
    torch.manual_seed(0)
    plain: Any = nn.Linear(24, 40) if layer == "linear" else Conv1D(40, 24)
    held: Any = nn.Linear(24, 40) if layer == "linear" else Conv1D(40, 24)
    held.load_state_dict(plain.state_dict())
    plain.weight.data = plain.weight.data.to(dtype).float()
    narrow.settle(held, str(dtype).removeprefix("torch."), "float32", [])
    assert type(held) in (narrow.NarrowLinear, narrow.NarrowConv1D) and held.weight.dtype == dtype
    x = torch.randn(3, 5, 24)
    outs, grads = [], []
    for one in (plain, held):
        seen = x.clone().requires_grad_()
        out = one(seen)
        out.square().sum().backward()
        outs.append(out)
        grads.append((seen.grad, one.weight.grad, one.bias.grad))
    assert outs[1].dtype == torch.float32 and torch.allclose(outs[0], outs[1], atol=1e-6)
    for theirs, ours in zip(*grads, strict=True):
        assert torch.allclose(ours.float(), theirs.to(ours.dtype).float(), rtol=1e-2, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert held(x).dtype == plain(x).dtype == torch.bfloat16
        assert torch.allclose(held(x).float(), plain(x).float(), rtol=0.02, atol=0.02)


def test_no_widened_copy_lives_until_the_backward_pass() -> None:
    """Closed form: after the forward pass of four frozen layers only the output is new; autograd
    over `weight.float()` would keep 4 bytes for each weight."""
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).requires_grad_(False)
    for layer in layers:
        narrow.settle(layer, "bfloat16", "float32", [])
    x = torch.randn(2, 64, requires_grad=True)
    with LiveBytes("cpu", [x, *layers.parameters()]) as counted:
        before = counted.now_bytes
        out = layers(x)
        assert counted.now_bytes == before + out.nbytes
        out.sum().backward()
    assert x.grad is not None


def test_tied_matrices_stay_one(recipe: Callable[..., Any]) -> None:
    """Behaviour: OPT's output is its embedding."""
    one = recipe(method="lora", objective="label_words", levers=["bf16_weights"])
    model: Any = build(one).model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize(
    "levers, changes, said",
    [
        (["bf16_weights"], {"model": {"dtype": "bfloat16"}}, "in that type already"),
        (["bf16_weights"], {"model": {"dtype": "float16"}, "method": "lora"}, "in 16 bits already"),
        (
            ["fp16_weights"],
            {"model": {"dtype": "float16"}, "method": "lora"},
            "in that type already",
        ),
        (["fp16_weights"], {"method": "full"}, "underflow; use bf16_weights"),
        (
            ["fp16_weights", "bf16_weights"],
            {"method": "lora"},
            "'bf16_weights' holds the same weights",
        ),
        (
            ["bf16_weights", "nf4_weights"],
            {"method": "lora"},
            "'nf4_weights' holds the same weights",
        ),
        (
            ["nf4_weights", "bf16_weights"],
            {"method": "lora"},
            "'bf16_weights' holds the same weights",
        ),
    ],
)
def test_what_would_change_nothing_or_cannot_be_is_refused(
    levers: list[str], changes: Any, said: str, recipe: Callable[..., Any]
) -> None:
    """Behaviour: before anything is loaded, with the reason."""
    with pytest.raises(InputError) as refusal:
        recipe(levers=levers, **changes)
    assert any(said in str(p) for p in refusal.value.problems), refusal.value


def test_full_training_from_random_weights_in_bfloat16(
    recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: what is made at random is converted after it is made, and trains."""
    one = recipe(
        model={"init": "random"}, method="full", levers=["bf16_weights"],
        loop={"steps": 30}, optimizer={"name": "adamw", "lr": 3e-3},
    )  # fmt: skip
    record = lowres.run(one, output_folder=tmp_path / "out", quiet=True, plan=False)
    assert sum(record.losses[-5:]) < sum(record.losses[:5])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_that_was_stopped_and_resumed_equals_the_uninterrupted_one(
    method: str, raw_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Reference: the uninterrupted run, bit for bit: losses and what was saved."""
    keys = raw_recipe(method=method, levers=["bf16_weights"], loop={"save_every": 1})
    whole = lowres.run(
        lowres.load_recipe(keys), output_folder=tmp_path / "a", quiet=True, plan=False
    )
    late = lowres.load_recipe(keys | {"budget": {"minutes": 1e-6}})
    with pytest.raises(OutOfTime):
        lowres.run(late, output_folder=tmp_path / "b", quiet=True, plan=False)
    again = lowres.load_recipe(keys)
    resumed = lowres.run(
        again, output_folder=tmp_path / "b", resume="latest", quiet=True, plan=False
    )
    assert resumed.losses == whole.losses
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    ours, theirs = (load_file(tmp_path / n / "model" / name) for n in ("b", "a"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_give_no_rows(rows: int) -> None:
    """Closed form: an expert that no token chose."""
    layer = narrow.NarrowLinear(4, 3)
    layer.weight.data = layer.weight.data.bfloat16()
    out = layer(torch.ones(rows, 4, requires_grad=True))
    assert out.shape == (rows, 3)
    out.sum().backward()
    out = layer(torch.ones(2, 1, 4, requires_grad=True))
    assert not out._is_view() or out.add_(1.0) is out
