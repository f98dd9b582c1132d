"""LoRTA: one tensor for all attentions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowres.core.errors import InputError
from lowres.methods._lorta import MATRICES
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


def factors(model: Any) -> Any:
    (owner,) = [d for d in deltas(model).values() if "factors" in d._modules]
    return owner.factors


def change(own: Any, matrix: int, attention: int, heads: int, scale: float) -> torch.Tensor:
    """(out, in), head by head as the paper writes it."""
    slices = [
        own.A @ torch.diag(own.heads[h] * own.matrices[matrix] * own.attentions[attention]) @ own.B
        for h in range(heads)
    ]  # each (D, E)
    side_by_side = torch.cat(slices, 1) * scale
    return side_by_side if matrix == 3 else side_by_side.T


@pytest.mark.parametrize("make", [llama, opt])
def test_every_matrix_changes_by_its_slice(make: Any) -> None:
    """Reference: A diag(c_h c_m c_l) B for each head, in float64, against the merged weights and
    against unmerged logits. Keys and values of the Llama have half of the heads; OPT makes keys
    before queries.
    """
    plain = make().double()
    model = moved(adapted(make().double(), "lorta", rank=3, alpha=6)).double()
    before, own = logits(model), factors(model)
    names = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "o_proj": 3, "out_proj": 3}
    expected = {}
    for path in deltas(model):
        matrix, attention = names[path.rpartition(".")[2]], int(path.split("layers.")[1][0])
        heads = 2 if make is llama and matrix in (1, 2) else 4
        expected[path] = change(own, matrix, attention, heads, 2.0).detach()
    assert len(expected) == 8
    merged = model.merge_and_unload()
    for path, value in expected.items():
        moved_by = merged.get_submodule(path).weight - plain.get_submodule(path).weight
        assert torch.allclose(moved_by, value, atol=1e-12), path
    assert torch.allclose(logits(merged), before, atol=1e-10)
    assert not torch.allclose(before, logits(plain), atol=1e-3)


def test_the_count_is_that_of_the_paper() -> None:
    """Closed form: r (d + d / H + H + L + 4), wherever the trained blocks are."""
    assert trainable(adapted(llama(), "lorta", rank=5)) == 5 * (32 + 8 + 4 + 2 + len(MATRICES))
    assert 64 * (4096 + 128 + 32 + 32 + 4) == 274_688  # 7 B parameters, r 64


def test_an_attention_to_an_encoder_counts_as_one_more() -> None:
    """Closed form: L is 2 + 2 * 2 for two blocks of each side; reference: unmerged logits, where
    the heads together are wider than the model.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=50, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=3,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = moved(adapted(T5ForConditionalGeneration(config).double().eval(), "lorta", rank=5))
    assert trainable(model) == 5 * (32 + 16 + 3 + 6 + 4)
    ids = {"input_ids": torch.arange(6)[None], "decoder_input_ids": torch.arange(4)[None]}
    before = model(**ids).logits
    assert torch.allclose(model.merge_and_unload()(**ids).logits, before, atol=1e-10)


def test_with_one_head_and_one_block_it_is_lora() -> None:
    """Reference: PEFT's LoRA with A and B, all vectors at one; rounding in float32."""
    import peft

    def one() -> Any:
        return llama(num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1)

    ours = moved(adapted(one(), "lorta", rank=3, alpha=6))
    own = factors(ours)
    for vectors in (own.heads, own.matrices, own.attentions):
        vectors.data.fill_(1)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=names)
    theirs: Any = peft.get_peft_model(one(), config)
    for path in deltas(ours):
        layer = theirs.base_model.model.get_submodule(path)
        into, out = (own.B, own.A.T) if path.endswith("o_proj") else (own.A.T, own.B)
        layer.lora_A["default"].weight.data = into.detach()
        layer.lora_B["default"].weight.data = out.detach().T
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)


def test_the_tensor_is_saved_once_and_each_delta_adds_nothing() -> None:
    """Behaviour: five tensors in the state dict, whatever the number of layers."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(adapted(llama(), "lorta"))
    assert sorted(name.rpartition(".")[2] for name in state) == [
        "A", "B", "attentions", "heads", "matrices",
    ]  # fmt: skip


def test_backward_keeps_the_input_alone() -> None:
    """Closed form: bytes of x; the thin matrix of each layer is made anew."""
    model = moved(adapted(llama(), "lorta"))
    x = torch.randn(16, 32).bfloat16()
    for delta in deltas(model).values():
        output = torch.zeros(16, delta._heads * 8).bfloat16()
        assert kept_bytes(delta.change, output, x) == x.numel() * 2


def test_what_has_no_place_for_it_is_refused_with_the_reason(recipe: Callable[..., Any]) -> None:
    """Behaviour: fused queries, keys and values; blocks that take turns."""
    with pytest.raises(InputError, match="queries, keys and values at once"):
        adapted(gpt2(), "lorta")
    with pytest.raises(InputError, match="one tensor of all blocks"):
        recipe(method="lorta", freezing={"name": "lisa", "at_once": 1})
