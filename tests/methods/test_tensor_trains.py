"""LoRETTA: trains of cores, and what they are as matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowres.methods._tensor_train import TensorTrain, TensorTrainAdapter, TensorTrainPair, modes
from tests.methods.adapted import (
    adapted,
    deltas,
    gpt2,
    kept_bytes,
    llama,
    logits,
    moved,
    opt,
    trainable,
)

CPU = torch.device("cpu")


def dense(train: TensorTrain) -> torch.Tensor:
    """Every core contracted at once, by its indices."""
    count = len(train.cores)
    bonds, sizes = range(count + 1), range(count + 1, 2 * count + 1)
    operands: list[Any] = []
    for place, core in enumerate(train.cores):
        operands += [core, [bonds[place], sizes[place], bonds[place + 1]]]
    tensor = torch.einsum(*operands, list(sizes))
    given = math.prod(tensor.shape[: train._cut])
    return tensor.reshape(given, -1)


def count(given: int, made: int, rank: int) -> int:
    sizes = modes(given) + modes(made)
    ranks = (1, *[rank] * (len(sizes) - 1), 1)
    return sum(r * k * s for r, k, s in zip(ranks, sizes, ranks[1:], strict=False))


def test_modes_are_those_of_the_paper_and_multiply_to_the_size() -> None:
    """Reference: the shapes of the authors' code for 768, 4096 and 64."""
    assert modes(768) == (8, 8, 12)
    assert modes(4096) == (16, 16, 16)
    assert modes(64) == (8, 8)
    assert modes(8) == (8,)
    assert modes(2039) == (2039,)  # prime
    assert all(math.prod(modes(size)) == size for size in range(1, 700))


def test_parameters_of_a_train_are_the_sum_over_its_cores() -> None:
    """Closed form: sum of R K R; 80 + 400 + 400 + 200 + 40 for 4096 x 64 at rank 5."""
    train = TensorTrain(4096, 64, 5, CPU)
    assert sum(core.numel() for core in train.cores) == count(4096, 64, 5) == 1120


@pytest.mark.parametrize(("given", "made"), [(768, 64), (64, 96), (12, 8), (7, 768)])
def test_a_train_is_the_matrix_that_its_cores_contract_to(given: int, made: int) -> None:
    """Reference: all cores contracted by index, in float64; tolerance is its rounding."""
    train = TensorTrain(given, made, 3, CPU).double()
    x = torch.randn(5, given, dtype=torch.float64)
    assert dense(train).shape == (given, made)
    assert torch.allclose(train(x), x @ dense(train), atol=1e-12)


def test_a_train_starts_with_the_spread_of_its_input_or_at_zero() -> None:
    """Closed form: unit variance in, unit variance out on average; over 40 draws within 40 %."""
    torch.manual_seed(0)
    x = torch.randn(50, 256)
    made = torch.stack([TensorTrain(256, 64, 4, CPU)(x).detach().var() for _ in range(40)])
    assert 0.6 < float(made.mean()) < 1.4
    assert not TensorTrain(256, 64, 4, CPU, zero=True)(x).any()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_rep_has_two_trains_for_each_layer_and_merges(make: Any) -> None:
    """Closed form of the count; reference: unmerged logits, to rounding in float32."""
    model = moved(adapted(make(), "loretta_rep", rank=4, train_rank=3))
    wide = {"q_proj": (32, 32), "v_proj": (32, 16), "c_attn": (32, 96)}
    each = [count(i, 4, 3) + count(4, o, 3) for i, o in (
        wide[path.rpartition(".")[2]] for path in deltas(model)
    )]  # fmt: skip
    assert len(each) == (4 if make is llama else 2)
    assert trainable(model) == sum(each)
    before = logits(model)
    assert torch.allclose(logits(model.merge_and_unload()), before, atol=1e-4)


def test_rep_is_lora_with_the_factors_that_its_trains_make() -> None:
    """Reference: PEFT's LoRA with A and B set to the dense trains; rounding in float32."""
    import peft

    ours = moved(adapted(llama(), "loretta_rep", rank=4, alpha=6, train_rank=3))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    theirs: Any = peft.get_peft_model(llama(), config)
    for path, delta in deltas(ours).items():
        layer = theirs.base_model.model.get_submodule(path)
        layer.lora_A["default"].weight.data = dense(delta.down).detach().T
        layer.lora_B["default"].weight.data = dense(delta.up).detach().T
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    assert not torch.allclose(logits(ours), logits(llama()), atol=1e-2)


def test_adp_is_a_bottleneck_of_the_dense_trains() -> None:
    """Reference: the two matrices in float64; closed form of the count."""
    base = nn.Linear(24, 32).double()
    settings = {"bottleneck": 8, "train_rank": 3, "activation": "tanh"}
    delta = moved(TensorTrainAdapter(base, settings).double())
    y = base(torch.randn(3, 24, dtype=torch.float64))
    hidden = torch.tanh(y @ dense(delta.down) + delta.down_bias)
    expected = y + hidden @ dense(delta.up) + delta.up_bias
    assert torch.allclose(delta.change(y), expected, atol=1e-12)
    assert trainable(delta) == count(32, 8, 3) + 8 + count(8, 32, 3) + 32


def test_adp_stands_behind_attention_and_behind_the_feed_forward_part() -> None:
    """Closed form: twice a block; behaviour: no merge, since it is no linear map."""
    for model, names in ((llama(), {"o_proj", "down_proj"}), (gpt2(), {"c_proj"}), (opt(), None)):
        plain = logits(model)
        ours = adapted(model, "loretta_adp", bottleneck=8, train_rank=2)
        assert torch.equal(logits(ours), plain)
        assert len(deltas(ours)) == 4
        assert names is None or {path.rpartition(".")[2] for path in deltas(ours)} == names
        assert trainable(ours) == 4 * (count(32, 8, 2) + 8 + count(8, 32, 2) + 32)
        with pytest.raises(ValueError, match="cannot be merged"):
            ours.merge_and_unload()


def test_an_adapter_that_cannot_be_merged_does_not_keep_another_from_it() -> None:
    """Reference: the unmerged logits of the one that is merged; behaviour: the other is refused by
    name and when it is active."""
    ours = moved(adapted(llama(), "krona"))
    other = adapted(llama(), "loretta_adp", bottleneck=8, train_rank=2)
    ours.add_adapter("other", other.peft_config["default"])
    before = logits(ours)
    for merge in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge(adapter_names=["other"])
    ours.set_adapter("other")
    with pytest.raises(ValueError, match="cannot be merged"):
        ours.merge_adapter()
    ours.set_adapter("default")
    ours.merge_adapter()
    assert torch.allclose(logits(ours), before, atol=1e-5)
    ours.unmerge_adapter()
    assert torch.allclose(logits(ours.merge_and_unload()), before, atol=1e-5)


@pytest.mark.parametrize("kind", [TensorTrainPair, TensorTrainAdapter])
def test_backward_keeps_the_input_alone(kind: Any) -> None:
    """Closed form: bytes of x; the thin factors and what they make are made anew. The gradients
    are those of the same mathematics with everything kept."""
    base = nn.Linear(32, 32).requires_grad_(False)
    settings = {
        "rank": 4, "alpha": 4, "train_rank": 3, "bottleneck": 8, "activation": "gelu",
    }  # fmt: skip
    delta = moved(kind(base, settings))
    x = torch.randn(64, 32).bfloat16().requires_grad_()
    output = torch.zeros(64, 32).bfloat16()
    assert kept_bytes(lambda x: F.relu(delta.change(output if kind is TensorTrainPair else x, x)),
                      x) == 2 * x.numel() * 2  # fmt: skip  # x, and what relu keeps
    x = torch.randn(6, 32)
    grads = [
        torch.autograd.grad(made.square().sum(), list(delta.parameters()))
        for made in (delta.change(x, x), x + delta._added(x))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
