"""Adapters of text classifiers, saved and put beside their base again, by each form of a head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowres.bridges.blocks import map_blocks
from lowres.bridges.peft import load_adapter
from lowres.core import registry

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 1,
}  # fmt: skip
DISTIL: dict[str, Any] = {
    "vocab_size": 50, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip
IDS = torch.arange(5, 25).view(2, 10)
# One module; one of two; two, of which PEFT's pattern matches both.
MODELS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "bert": (lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)),
             ("classifier.weight", "classifier.bias")),
    "roberta": (
        lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SIZES)),
        ("classifier.out_proj.weight", "classifier.out_proj.bias",
         "classifier.dense.weight", "classifier.dense.bias"),
    ),
    "distilbert": (
        lambda: transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(**DISTIL)
        ),
        ("classifier.weight", "classifier.bias", "pre_classifier.weight", "pre_classifier.bias"),
    ),
}  # fmt: skip
HEADS = {"bert": ("classifier",), "roberta": ("classifier",),
         "distilbert": ("classifier", "pre_classifier")}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", ["lora", "houlsby", "prompt_tuning"])
@pytest.mark.parametrize("fresh", ["all", "last", "none"])
def test_a_classifier_s_adapter_loads_again(
    kind: str, method: str, fresh: str, tmp_path: Path
) -> None:
    """Reference: PEFT, which trains, saves and expects a text classifier's head whole, be it new,
    of another number of classes, or the checkpoint's own. Logits to the bit, by plain PEFT and by
    lowres."""
    import peft

    make, head = MODELS[kind]
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "base")
    plain = copy.deepcopy(model)
    made = {"all": head, "last": head[:2], "none": ()}[fresh]
    blocks = map_blocks(model, made, may_have_new_head=True)
    assert blocks.head == HEADS[kind]
    adapted: Any = registry.load("method", method)().apply(model, blocks)  # type: ignore[attr-defined]
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05
    trained = adapted.eval()(input_ids=IDS).logits
    assert not torch.allclose(trained, plain(input_ids=IDS).logits)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(copy.deepcopy(plain), tmp_path / "adapter").eval()
    assert torch.equal(ours(input_ids=IDS).logits, trained)
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(theirs.eval()(input_ids=IDS).logits, trained)


@pytest.mark.parametrize("method", ["lora", "ia3", "oft", "attn_scale", "krona"])
def test_a_head_of_two_modules_is_merged_with_its_adapter(method: str) -> None:
    """Reference: logits before; and of own methods' unloading without a merge the base's."""
    make, head = MODELS["roberta"]
    torch.manual_seed(0)
    model = make().eval()
    base = model(input_ids=IDS).logits
    cls: Any = registry.load("method", method)
    chosen = cls(**cls.sample_fields)
    adapted = chosen.apply(model, map_blocks(model, head, may_have_new_head=True)).eval()
    draws = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=draws)
    trained = adapted(input_ids=IDS).logits
    unloaded = copy.deepcopy(adapted)
    merged = chosen.merge(adapted)
    assert not any("modules_to_save" in name for name, _ in merged.named_modules())
    assert torch.allclose(merged(input_ids=IDS).logits, trained, atol=1e-5)
    if method in ("attn_scale", "krona"):
        assert torch.equal(unloaded.unload()(input_ids=IDS).logits, base)


def test_a_head_whose_name_peft_does_not_know_is_what_is_new() -> None:
    """Behaviour: of BART's the new half alone, and nothing where the checkpoint holds all."""
    config = transformers.BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    model = transformers.BartForSequenceClassification(config)
    names = [n for n, _ in model.named_parameters() if n.startswith("classification_head")]
    head = lambda fresh: map_blocks(model, fresh, may_have_new_head=True).head
    assert head(names) == ("classification_head.dense", "classification_head.out_proj")
    last = [n for n in names if "out_proj" in n]
    assert head(last) == ("classification_head.out_proj",) and head([]) == ()
