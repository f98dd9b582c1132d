"""Intrinsic SAID: one vector, taken to every layer by random maps that are not kept in a file."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lowres.core.errors import InputError
from lowres.methods._fastfood import FastfoodDelta, Hadamard, hadamard
from tests.methods.adapted import (
    adapted,
    deltas,
    gpt2,
    kept_bytes,
    llama,
    logits,
    moved,
    trainable,
)


def test_the_transform_is_the_walsh_hadamard_matrix() -> None:
    """Closed form: entry (j, k) is -1 to the number of bits that j and k share, by sqrt(P); it is
    its own inverse.
    """
    for size in (2, 8, 64, 128):
        j = range(size)
        signs = torch.tensor([[(-1.0) ** (a & b).bit_count() for b in j] for a in j])
        assert torch.equal(hadamard(size).float(), signs)
        transform, x = Hadamard(size, torch.device("cpu")), torch.randn(3, size).double()
        assert torch.allclose(transform(x), x @ signs.double() / math.sqrt(size), atol=1e-12)
        assert torch.allclose(transform(transform(x)), x, atol=1e-12)


def one(given: int, made: int, dimension: int) -> FastfoodDelta:
    base = nn.Linear(given, made)
    delta = FastfoodDelta(base, {"dimension": dimension, "seed": 3}).double()
    return moved(delta)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dimension", [5, 32, 70])
def test_coefficients_are_fastfood_of_the_vector(dimension: int) -> None:
    """Reference: H G Pi H B as dense matrices in float64, over the vector's chunks added up."""
    delta, size = one(20, 30, dimension), 32
    h = hadamard(size).double() / math.sqrt(size)
    pi = torch.eye(size, dtype=torch.float64)[delta.order.long()]
    g = torch.diag(delta.gauss.double() / 4096)
    expected = torch.zeros(size, dtype=torch.float64)
    for chunk, signs in zip(delta.theta.split(size), delta.signs, strict=True):
        padded = torch.cat([chunk, torch.zeros(size - len(chunk))])
        expected = expected + h @ g @ pi @ h @ torch.diag(signs.double()) @ padded
    assert torch.allclose(delta.coefficients(), expected, atol=1e-12)


@pytest.mark.parametrize(("given", "made"), [(20, 30), (32, 12), (3, 64)])
def test_the_change_is_a_sum_of_rank_one_matrices(given: int, made: int) -> None:
    """Reference: the dense sum in float64, for the activation form and for merging."""
    delta, size = one(given, made, 50), 1 << (max(given, made) - 1).bit_length()
    h = hadamard(size).double() / math.sqrt(size)
    rows = h[delta.input_order.long()] * delta.input_signs.double()
    dense = sum(
        w * torch.outer(h[k, :made], rows[k, :given])
        for k, w in enumerate(delta.coefficients() * delta.scale)
    ) * (size / math.sqrt(given * made))  # fmt: skip
    x = torch.randn(7, given, dtype=torch.float64)
    assert torch.allclose(delta.change(torch.zeros(7, made).double(), x), x @ dense.T, atol=1e-11)
    base = nn.Linear(given, made).double()
    before = base.weight.detach().clone()
    delta.fold(base, 1)
    assert torch.allclose(base.weight - before, dense, atol=1e-11)


def test_every_layer_changes_by_about_the_norm_of_the_vector() -> None:
    """Closed form: the norm in expectation; 5 standard errors of a mean over 12 layers."""
    torch.manual_seed(0)
    ratios = []
    before: list[Any] = []
    for sizes in [(200, 300), (256, 256), (300, 90)] * 4:
        base = nn.Linear(*sizes).double()
        base.weight.data.zero_()
        delta = FastfoodDelta(base, {"dimension": 100, "seed": 0}, before).double()
        before.append(delta)
        before[0].theta.data = torch.ones(100).double()
        delta.fold(base, 1)
        ratios.append(base.weight.detach().norm() / 10)
    spread = torch.stack(ratios).std() / math.sqrt(len(ratios))
    assert abs(torch.stack(ratios).mean() - 1) < 5 * float(spread) < 0.2


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_count_is_the_dimension_and_a_scale_for_each_tensor(make: Any) -> None:
    """Closed form; reference: unmerged logits after merging, to rounding in float32."""
    model = moved(adapted(make(), "intrinsic_said", dimension=100))
    assert trainable(model) == 100 + len(deltas(model)) == 100 + (14 if make is llama else 8)
    before = logits(model)
    assert torch.allclose(logits(model.merge_and_unload()), before, atol=1e-4)


def test_the_maps_follow_from_the_seed_and_are_not_saved() -> None:
    """Behaviour: another global state of random numbers changes nothing, another seed does, and so
    does the place in the model; the state dict has the vector and the scales.
    """
    from peft import get_peft_model_state_dict

    def made(seed: int) -> Any:
        model = moved(adapted(llama(), "intrinsic_said", dimension=100, seed=seed))
        torch.manual_seed(seed + 5)
        return model

    first = made(0)
    assert torch.equal(logits(first), logits(made(0)))
    assert not torch.allclose(logits(first), logits(made(1)), atol=1e-3)
    kept = {name.rpartition(".")[2] for name in get_peft_model_state_dict(first)}
    assert kept == {"theta", "scale"}
    orders = [d.order.tolist() for d in deltas(first).values() if len(d.order) == 32]
    assert len({str(order) for order in orders}) == len(orders) > 4


def test_a_base_in_16_bits_has_the_same_maps() -> None:
    """Reference: the coefficients beside a base in float32. PEFT casts what it puts beside a base,
    which would round Gaussian numbers kept as such.
    """
    wide, narrow = (
        moved(adapted(llama().to(dtype), "intrinsic_said", dimension=100))
        for dtype in (torch.float32, torch.bfloat16)
    )
    for a, b in zip(deltas(wide).values(), deltas(narrow).values(), strict=True):
        assert torch.equal(a.coefficients(), b.coefficients())


def test_backward_keeps_the_input_alone() -> None:
    """Closed form: bytes of x, whatever the sizes of the layer."""
    delta = one(20, 30, 50).float()
    x = torch.randn(16, 20).bfloat16()
    output = torch.zeros(16, 30).bfloat16()
    assert kept_bytes(delta.change, output, x) == x.numel() * 2


def test_blocks_that_take_turns_are_refused(recipe: Callable[..., Any]) -> None:
    """Behaviour: there is next to nothing that could."""
    with pytest.raises(InputError, match="one vector of all blocks"):
        recipe(method="intrinsic_said", freezing={"name": "lisa", "at_once": 1})
