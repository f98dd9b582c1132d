"""Groups of blocks with different parts: which, where, how large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowres.bridges.blocks import map_blocks
from lowres.core import registry
from lowres.core.delta import Delta
from lowres.making.build import build
from lowres.methods import s4
from tests.methods.test_prefixes import logits, plain, rows

PARTS = {"adapter": "SerialAdapter", "low rank": "LowRank", "prefix": "KeyValuePrefix",
         "bias": "BiasDelta"}  # fmt: skip


def of_depth(count: int, kind: str = "bert", width: int = 32, **fields: Any) -> Any:
    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

    if kind == "bert":
        config: Any = BertConfig(hidden_size=width, num_hidden_layers=count, num_attention_heads=2,
                                 intermediate_size=4 * width, vocab_size=128)  # fmt: skip
        model: Any = BertModel(config)
    else:
        config = T5Config(d_model=width, d_kv=16, d_ff=4 * width, num_layers=count, num_heads=3,
                          num_decoder_layers=count, vocab_size=128)  # fmt: skip
        model = T5ForConditionalGeneration(config)
    model.requires_grad_(False)
    method = registry.load("method", "s4")(**fields)
    return method.apply(model, map_blocks(model)), model


def parts_of(block: Any) -> set[str]:
    return {type(m).__name__ for m in block.modules() if isinstance(m, Delta)}


@pytest.mark.parametrize(
    "count, sizes",
    [(4, [1, 1, 1, 1]), (6, [1, 2, 2, 1]), (12, [2, 4, 4, 2]), (24, [4, 8, 8, 4]),
     (3, [0, 1, 1, 1]), (2, [0, 1, 1, 0]), (1, [0, 0, 1, 0])],
)  # fmt: skip
def test_groups_are_a_spindle(count: int, sizes: list[int]) -> None:
    """Closed form: a sixth, a third, a third, a sixth; the order of the blocks is kept."""
    found = [s4._group(i, count) for i in range(count)]
    assert found == sorted(found)
    assert [found.count(g) for g in range(4)] == sizes


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_each_group_has_its_parts(kind: str) -> None:
    """Behaviour: the table of the paper, in each stack; T5 has no biases."""
    _, model = of_depth(6, kind)
    stacks = [model.encoder.layer] if kind == "bert" else [model.encoder.block, model.decoder.block]
    for stack in stacks:
        for at, group in enumerate((0, 1, 1, 2, 2, 3)):
            wanted = {PARTS[p] for p in s4.GROUPS[group] if kind == "bert" or p != "bias"}
            assert parts_of(stack[at]) == wanted


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_blocks_train_equally_much(kind: str) -> None:
    """Closed form: the share of all parameters over the number of blocks, less than one unit of
    each part below it."""
    share = 0.1
    adapted, model = of_depth(6, kind, share=share)
    blocks = map_blocks(model).names
    plain_count = sum(p.numel() for n, p in model.named_parameters() if not p.requires_grad)
    budget = share * plain_count / len(blocks)
    for name in blocks:
        block = model.get_submodule(name)
        trained = sum(p.numel() for p in block.parameters() if p.requires_grad)
        # A unit of an adapter, of a product beside each of two attentions, of their prefixes.
        most = 3 + (2 * 32 + 1) + 2 * 2 * (32 + 48) + 2 * 2 * 48
        assert budget - most < trained <= budget, name


def test_a_frozen_part_keeps_the_groups_of_the_whole(recipe: Callable[..., Any]) -> None:
    """Behaviour: groups are counted over all blocks of a stack, and frozen ones get nothing."""
    freezing = {"name": "prefix", "frozen": 1}
    built = build(recipe("encoder", method="s4", freezing=freezing))
    blocks = [built.model.get_submodule(n) for n in built.learner.blocks.names]
    found = [{PARTS[p] for p in s4.GROUPS[g]} for g in (2, 3)]
    assert [parts_of(b) for b in blocks] == [set(), *found]


@pytest.mark.parametrize("family", ["gpt2", "llama", "encoder_decoder"])
def test_other_models_have_their_places(family: str) -> None:
    """Behaviour: fused layers, grouped heads, two stacks; generating equals whole passes."""
    model = plain(family)
    adapted: Any = registry.load("method", "s4")().apply(model, map_blocks(model))
    adapted.double().eval()
    inputs = rows(family)
    first = logits(adapted, **inputs)
    with adapted.disable_adapter():
        assert not torch.allclose(first, logits(adapted, **inputs))
    inputs.pop("decoder_input_ids", None)
    out = adapted.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    plain_ids = out[:, :1] if family == "encoder_decoder" else inputs["input_ids"]
    for _ in range(3):
        if family == "encoder_decoder":
            scores = logits(adapted, **inputs, decoder_input_ids=plain_ids)[:, -1]
        else:
            scores = logits(adapted, input_ids=plain_ids)[:, -1]
        scores[:, adapted.config.eos_token_id] = -torch.inf
        plain_ids = torch.cat([plain_ids, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, plain_ids)


def test_a_product_is_that_of_peft() -> None:
    """Reference: PEFT's LoRA with the same factors; merged too."""
    from peft import LoraConfig, get_peft_model

    from lowres.methods._low_rank import LowRank

    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(6, 5)).double()
    base = torch.nn.Linear(6, 5).double()
    base.load_state_dict(model[0].state_dict())
    theirs = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, target_modules=["0"]))
    layer: Any = theirs.base_model.model[0]
    ours = LowRank(base, {"rank": 3, "alpha": 7}).double()
    for one, other in ((ours.a, layer.lora_A), (ours.b, layer.lora_B)):
        torch.nn.init.normal_(one.weight)
        other["default"].weight.data.copy_(one.weight)
    x = torch.randn(4, 6).double()
    wanted = theirs(x)
    assert torch.allclose(ours.change(base(x), x), wanted)
    ours.fold(base, 1)
    assert torch.allclose(base(x), wanted)


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_it_trains_over_four_bits_with_the_same_sizes(
    kind: str, recipe: Callable[..., Any]
) -> None:
    """Reference: the sizes over whole weights; packed ones count as what they stand for."""
    sizes = []
    for levers in ([], ["nf4_weights"]):
        built = build(recipe(kind, method="s4", objective="label_words", levers=levers))
        sizes.append({n: p.shape for n, p in built.model.named_parameters() if p.requires_grad})
    assert sizes[0] == sizes[1]
