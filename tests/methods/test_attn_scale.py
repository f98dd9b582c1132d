"""attn_scale: factors on queries, keys, values and attention logits, and offsets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowres.bridges.blocks import map_blocks
from lowres.core import registry
from lowres.core.errors import InputError, LowresError
from lowres.making.build import build

METHOD: Any = registry.load("method", "attn_scale")
BLOCKS, WIDTH, HEADS = 2, 8, 2
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def model_of(family: str) -> Any:
    import transformers as tf

    torch.manual_seed(0)
    if family == "gpt2":
        config: Any = tf.GPT2Config(
            vocab_size=32, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_positions=16
        )
        model: Any = tf.GPT2LMHeadModel(config)
    elif family == "bert":
        config = tf.BertConfig(
            vocab_size=32, hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=HEADS,
            intermediate_size=16,
        )  # fmt: skip
        model = tf.BertForMaskedLM(config)
    else:
        kind = {"llama": "Llama", "qwen3": "Qwen3"}[family]
        config = getattr(tf, f"{kind}Config")(
            vocab_size=32, hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=HEADS,
            num_key_value_heads=1, head_dim=WIDTH // HEADS, intermediate_size=16,
        )  # fmt: skip
        model = getattr(tf, f"{kind}ForCausalLM")(config)
    # Biases start at zero, which would hide one that is not scaled, and matrices near it, which
    # would hide what happens before a softmax.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.eval().double()


def adapted(family: str, **fields: Any) -> Any:
    model = model_of(family)
    return METHOD(**fields).apply(model, map_blocks(model)).double()


def shaken(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


def trained(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_merged_equals_unmerged(family: str) -> None:
    """Reference: the adapter beside its base, with factors far from 1. Tolerance: float64."""
    model = shaken(adapted(family, offsets=family != "llama"))
    before = logits(model)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), before, atol=1e-3)
    model.merge_adapter()
    assert torch.allclose(logits(model), before, atol=1e-10)
    model.unmerge_adapter()
    assert torch.allclose(logits(model), before, atol=1e-10)
    assert torch.allclose(logits(model.merge_and_unload()), before, atol=1e-10)


def test_the_factors_are_those_of_the_docstring() -> None:
    """Reference: a BERT whose matrices and biases were multiplied by hand, row by row and head by
    head, and whose output biases were raised by the offsets. Tolerance: float64.
    """
    model = shaken(adapted("bert", offsets=True))
    plain = model_of("bert")
    there = {n: p.detach() for n, p in model.named_parameters()}
    for number, layer in enumerate(plain.bert.encoder.layer):

        def learned(place: str, name: str, number: int = number) -> torch.Tensor:
            block = f"base_model.model.bert.encoder.layer.{number}"
            return there[f"{block}.{place}.lowres_delta_parts.default.{name}"]

        for name in ("query", "key", "value"):
            factor = 1 + learned(f"attention.self.{name}", "scale.rows")
            if name == "query":
                heads = 1 + learned("attention.self.query", "scale.heads")
                factor = factor * heads.repeat_interleave(WIDTH // HEADS)
            linear = getattr(layer.attention.self, name)
            linear.weight.data *= factor[:, None]
            linear.bias.data *= factor
        for place in ("attention.output.dense", "output.dense"):
            layer.get_submodule(place).bias.data += learned(place, "offset.offset")
    assert torch.allclose(logits(plain), logits(model), atol=1e-10)


def test_a_factor_of_a_head_scales_its_attention_logits() -> None:
    """Reference: the eager attention's maps of a BERT whose logits were scaled for each head."""
    model = shaken(adapted("bert", scales=("map",)))
    (heads,) = [p.detach() for n, p in model.named_parameters() if "layer.0" in n and "heads" in n]
    plain = model_of("bert")
    for one in (model, plain):
        one.config._attn_implementation = "eager"
    ours, theirs = (
        m(input_ids=IDS, output_attentions=True).attentions[0].detach() for m in (model, plain)
    )
    # Logits are known from a map up to a constant of each row, which the softmax takes away.
    expected = (theirs.log() * (1 + heads)[None, :, None, None]).softmax(-1)
    assert torch.allclose(ours, expected, atol=1e-10)


@pytest.mark.parametrize(
    ("fields", "each"),
    [
        ({}, 3 * WIDTH + HEADS),
        ({"scales": ("value",)}, WIDTH),
        ({"scales": ("map",)}, HEADS),
        ({"offsets": True}, 3 * WIDTH + HEADS + 2 * WIDTH),
        ({"scales": (), "offsets": True}, 2 * WIDTH),
    ],
)
def test_how_many_are_trained(fields: Any, each: int) -> None:
    """Closed form: d for each of query, key and value, H for the map, 2 d of offsets, a block."""
    assert trained(adapted("bert", **fields)) == BLOCKS * each


def test_how_many_are_trained_where_queries_and_keys_are_not_as_many() -> None:
    """Closed form: Llama's single key and value head has d / H rows; GPT-2's matrix has 3 d."""
    assert trained(adapted("llama")) == BLOCKS * (WIDTH + 2 * WIDTH // HEADS + HEADS)
    assert trained(adapted("gpt2")) == BLOCKS * (3 * WIDTH + HEADS)


def test_small_steps_are_held_in_16_bits() -> None:
    """Behaviour: 3e-3 moves some outputs of a bfloat16 model, in which 1 + 3e-3 is 1."""
    model = adapted("bert").to(torch.bfloat16)
    plain = logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(3e-3)
    assert not torch.equal(logits(model), plain)


def test_an_offset_without_a_bias_is_not_merged() -> None:
    """Behaviour: nothing is changed, not even the scales, which could be merged."""
    model = shaken(adapted("llama", offsets=True))
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(LowresError, match="has none there"):
        model.merge_and_unload()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("family", "fields", "why"),
    [
        ("gpt2", {"scales": ("query", "value")}, "scale all three"),
        ("qwen3", {}, "normalised"),
        ("bert", {"scales": ()}, "name a scale"),
    ],
)
def test_what_has_no_place_is_refused(family: str, fields: Any, why: str) -> None:
    """Behaviour."""
    with pytest.raises(InputError, match=why):
        adapted(family, **fields)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Phi", {"qk_layernorm": True}),
        ("StableLm", {"qk_layernorm": True}),
        ("HunYuanDenseV1", {"head_dim": WIDTH // HEADS}),
        ("Cohere", {"use_qk_norm": True}),
        ("Lfm2", {"full_attn_idxs": [0]}),
        ("NanoChat", {}),
        ("Olmo2", {}),
    ],
)
def test_a_factor_that_a_norm_of_queries_takes_away_is_refused(name: str, fields: Any) -> None:
    """Behaviour: by whatever name the norm has, with one weight for all heads, for each, or none.
    Their logits moved by 1e-6 and less with every head's factor doubled."""
    import transformers as tf

    config = getattr(tf, f"{name}Config")(
        vocab_size=32, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, intermediate_size=16, pad_token_id=0, **fields,
    )  # fmt: skip
    model = getattr(tf, f"{name}ForCausalLM")(config)
    with pytest.raises(InputError, match="normalised"):
        METHOD(scales=("map",)).apply(model, map_blocks(model))


def test_a_model_with_normalised_queries_takes_the_rest() -> None:
    """Behaviour: what the refusal of `map` proposes works."""
    model = adapted("qwen3", scales=("query", "key", "value"))
    assert trained(model) == BLOCKS * (WIDTH + 2 * WIDTH // HEADS)


def test_it_trains_beside_4_bits(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Behaviour: only outputs are scaled; every factor gets a gradient."""
    built = build(recipe(method={"name": "attn_scale", "offsets": True}, levers=["nf4_weights"]))
    batch = built.collator(built.train_rows[:4])
    torch.nn.functional.cross_entropy(built.learner.logits(batch), batch["labels"][:, 0]).backward()
    for name, parameter in built.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_queries_that_lie_head_by_head_are_not_scaled_by_a_guess() -> None:
    """Behaviour: GPTBigCode's fused matrix has all queries first with shared keys alone."""
    import transformers as tf

    def model(shared: bool) -> Any:
        return tf.GPTBigCodeForCausalLM(
            tf.GPTBigCodeConfig(
                vocab_size=32, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_positions=16,
                multi_query=shared,
            )
        )  # fmt: skip

    apart = model(shared=False)
    blocks = map_blocks(apart)
    with pytest.raises(InputError, match=r"which rows of '.*c_attn' are queries is not known"):
        METHOD(scales=("map",)).apply(apart, blocks)
    adapted_shared = METHOD(scales=("map",)).apply(model(shared=True), blocks)
    trained = sum(p.numel() for p in adapted_shared.parameters() if p.requires_grad)
    assert trained == BLOCKS * HEADS
