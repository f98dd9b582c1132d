"""SSL and SSB: linear layers whose inputs and outputs are scaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowres.core.errors import InputError, LowresError
from lowres.methods._scaled_sides import ScaledInput, ScaledSides, _ScaleOutput
from tests.methods.adapted import (
    adapted,
    deltas,
    falcon,
    gpt2,
    kept_bytes,
    llama,
    logits,
    moved,
    opt,
    trainable,
)

METHODS = ("ssl", "ssb")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_columns_and_rows_of_the_weight_are_scaled(method: str, make: Any) -> None:
    """Reference: diag(1 + t) W diag(1 + s), in float64, against merged weights and unmerged
    logits; the bias stays. Unmerging gives the weights back.
    """
    settings = {"targets": "c_attn+c_fc"} if make is gpt2 else {}
    plain = make().double()
    model = moved(adapted(make().double(), method, **settings)).double()
    before, found = logits(model), deltas(model)
    assert len(found) == {llama: 8, gpt2: 4, opt: 6}[make]
    expected = {}
    for path, delta in found.items():
        weight = plain.get_submodule(path).weight
        rows, columns = 1 + getattr(delta, "output", torch.zeros(1)), 1 + delta.input
        scales = torch.outer(rows, columns) if method == "ssb" else columns
        expected[path] = weight * (scales.T if make is gpt2 and method == "ssb" else
                                   columns[:, None] if make is gpt2 else scales)  # fmt: skip
    model.merge_adapter()
    for path, value in expected.items():
        layer = model.base_model.model.get_submodule(path)
        assert torch.allclose(layer.base_layer.weight, value, atol=1e-12), path
    assert torch.allclose(logits(model), before, atol=1e-10)
    model.unmerge_adapter()
    for path in expected:
        layer = model.base_model.model.get_submodule(path)
        assert torch.allclose(layer.base_layer.weight, plain.get_submodule(path).weight)
    assert torch.allclose(logits(model), before, atol=1e-10)


def test_the_counts_are_those_of_the_paper() -> None:
    """Reference: RoBERTa-base, 12 x 3 x 768 for SSL and 12 x 6,912 for SSB; made without memory."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    for method, expected in (("ssl", 12 * 3 * 768), ("ssb", 12 * 6912)):
        with torch.device("meta"):
            model = RobertaForMaskedLM(RobertaConfig(tie_word_embeddings=False))
        assert trainable(adapted(model, method)) == expected


def test_a_half_of_each_is_ia3() -> None:
    """Reference: PEFT's (IA)3, which scales outputs, or inputs of its feed-forward modules; without
    biases, which it scales too. Rounding in float32.
    """
    import peft

    def theirs(names: list[str], inputs: list[str]) -> Any:
        config = peft.IA3Config(target_modules=names, feedforward_modules=inputs)
        return peft.get_peft_model(llama(), config)

    def same(ours: Any, other: Any, name: str) -> None:
        for path, delta in deltas(ours).items():
            layer = other.base_model.model.get_submodule(path)
            vector = layer.ia3_l["default"]
            vector.data = (1 + getattr(delta, name)).detach().reshape(vector.shape)
        assert torch.allclose(logits(ours), logits(other), atol=1e-5)
        assert not torch.allclose(logits(ours), logits(llama()), atol=1e-3)

    outputs = moved(adapted(llama(), "ssb", targets="k_proj+v_proj"))
    for delta in deltas(outputs).values():
        delta.input.data.zero_()
    same(outputs, theirs(["k_proj", "v_proj"], []), "output")
    inputs = moved(adapted(llama(), "ssl", targets="down_proj"))
    same(inputs, theirs(["down_proj"], ["down_proj"]), "input")


@pytest.mark.parametrize("biased", [True, False])
def test_the_gradient_taken_from_the_output_is_that_of_the_product(biased: bool) -> None:
    """Reference: finite differences in float64, and at a scale of zero no NaN."""
    made = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    change = torch.tensor([0.3, -0.5, -2.0, 0.0, -0.999], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64) if biased else None
    assert torch.autograd.gradcheck(lambda z, t: _ScaleOutput.apply(z, t, bias), (made, change))
    zero = torch.full((5,), -1.0, dtype=torch.float64, requires_grad=True)
    _ScaleOutput.apply(made, zero, bias).sum().backward()
    assert torch.equal(zero.grad, torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize(("kind", "arrays"), [(ScaledInput, 1), (ScaledSides, 2)])
def test_backward_keeps_the_input_and_the_output(kind: Any, arrays: int) -> None:
    """Closed form: x, and for SSB y, which is what the next operation keeps as well; not W x. Two
    layers of one input keep it once.
    """
    base = nn.Linear(32, 32).requires_grad_(False)
    ours = [moved(kind(base, {})) for _ in range(2)]
    x = torch.randn(2, 64, 32)

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([delta.around(base, x) for delta in ours])

    own = (1 + 2 * (arrays - 1)) * x.numel() * 4
    assert kept_bytes(run, x) == own


@pytest.mark.parametrize("recomputed", [False, True])
def test_an_output_that_the_model_changes_in_place_is_refused(recomputed: bool) -> None:
    """Behaviour: Falcon adds to that of its last layer; no gradient is taken from the sum, where
    blocks are recomputed neither, of which torch says nothing. Without that layer it trains."""
    ids = torch.arange(24).view(2, 12)

    def train(targets: str) -> Any:
        model = moved(adapted(falcon(), "ssb", targets=targets)).train()
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, labels=ids).loss.backward()
        return model

    with pytest.raises(LowresError, match="32 features in place.*dense_4h_to_h"):
        train("all-linear")
    model = train("query_key_value+dense+dense_h_to_4h")
    assert all(d.output.grad.abs().sum() > 0 for d in deltas(model).values())


def test_one_scale_for_three_is_refused_unless_it_is_asked_for() -> None:
    """Behaviour: GPT-2 has no keys and values of their own."""
    for method in METHODS:
        with pytest.raises(InputError, match="all three's"):
            adapted(gpt2(), method)


def test_weight_decay_pulls_the_scale_to_one() -> None:
    """Closed form: a step of decay alone multiplies the distance from one."""
    delta = moved(ScaledSides(nn.Linear(8, 8), {}))
    before = delta.output.detach().clone()
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1, weight_decay=0.5)
    for parameter in delta.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(delta.output, before * 0.95)
