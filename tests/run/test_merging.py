"""An adapter that was trained over packed weights, folded into the base as it is in 16 bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowres
from lowres.bridges import peft, transformers
from lowres.core.errors import InputError, LowresError
from lowres.run import merging
from lowres.run.build import build

TINY = {"checkpoint": "package:lowres/assets/tiny_lm"}
STRONG = {"name": "lora", "targets": "all-linear", "rank": 4, "alpha": 64}


@pytest.fixture
def trained(recipe: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """A recipe and the folder of the adapter that a run of it saved."""

    def run(**changes: Any) -> tuple[Any, Path]:
        one = recipe(
            **{"model": TINY, "method": STRONG, "objective": "label_words",
               "optimizer": {"name": "adamw", "lr": 5e-3}} | changes
        )  # fmt: skip
        lowres.run(one, output_folder=tmp_path / "run", quiet=True, plan=False)
        return one, tmp_path / "run" / "model"

    return run


@pytest.mark.parametrize(
    "lever, dtype, objective",
    [
        ("nf4_weights", "bfloat16", "label_words"),
        ("nf4_weights", "float32", "classification"),
        ("int8_weights", "float16", "label_words"),
    ],
)
def test_what_was_trained_over_packed_weights_comes_out_as_a_plain_model(
    lever: str, dtype: str, objective: str, trained: Any, tmp_path: Path
) -> None:
    """Reference: transformers loads the folder and gives the logits of the unmerged adapter beside
    the base in the same type, within its rounding; they are near those it was trained beside."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    one, adapter = trained(
        model=TINY | {"dtype": dtype}, levers=[lever], objective=objective
    )  # fmt: skip
    out = merging.merge(one, adapter, tmp_path / "merged")
    assert out.dtype == dtype and out.distance <= merging.TOLERANCE[dtype]
    assert out.effect > 10 * out.distance, "the adapter does nothing: the test could not fail"
    assert out.distance < out.from_trained < 1
    assert out.folder == tmp_path / "merged"

    config = json.loads((out.folder / "config.json").read_text())
    assert "quantization_config" not in config
    tensors = load_file(out.folder / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {getattr(torch, dtype)}
    assert not any("lora" in name or "base_layer" in name for name in tensors)
    auto: Any = (
        AutoModelForCausalLM if objective == "label_words" else AutoModelForSequenceClassification
    )
    plain = auto.from_pretrained(out.folder, dtype=torch.float32).eval()
    assert type(plain.config).__name__ == "LlamaConfig"
    built = build(one)
    batch = built.collator(built.train_rows[:4])
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        theirs = peft.load_adapter(base_of(one, built), adapter).eval()(**inputs).logits.float()
        ours = plain(**inputs).logits
    if objective == "label_words":
        ours, theirs = (x[batch["attention_mask"].bool()] for x in (ours, theirs))
    assert float((ours - theirs).norm() / theirs.norm()) <= 2 * merging.TOLERANCE[dtype]


def base_of(one: Any, built: Any) -> Any:
    """The checkpoint by transformers alone; its new head comes with the adapter."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from lowres.bridges.transformers import resolve

    auto: Any = AutoModelForCausalLM
    more = {}
    if built.learner.head == "classification":
        auto, more = AutoModelForSequenceClassification, {"num_labels": 2}
    model = auto.from_pretrained(
        resolve(one.model.checkpoint).location, dtype=getattr(torch, one.model.dtype), **more
    )
    model.config.pad_token_id = built.tokenizer.pad_token_id
    return model


def test_over_plain_weights_nothing_is_lost(trained: Any, tmp_path: Path) -> None:
    """Closed form: the base that it was trained beside is the one that it is merged into."""
    one, adapter = trained()
    out = merging.merge(one, adapter, tmp_path / "merged")
    assert out.from_trained == 0 and out.distance < 1e-5 < out.effect


def test_a_wrong_merge_writes_nothing(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: the adapter is dropped instead of folded in."""
    one, adapter = trained()
    monkeypatch.setattr(type(one.method), "merge", lambda self, model: model.unload())
    with pytest.raises(LowresError, match="merged model's logits are off"):
        merging.merge(one, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_without_effect_is_not_merged(
    recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Closed form: LoRA's B is 0 before the first update, and the logits are those of the base."""
    one = recipe(model=TINY, method=STRONG, objective="label_words")
    built = build(one)
    transformers.save(built.model, built.tokenizer, tmp_path / "model")
    with pytest.raises(LowresError, match=r"does nothing: .* 4 rows are the same in float32"):
        merging.merge(one, tmp_path / "model", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_lacks_a_tensor_is_not_merged(trained: Any, tmp_path: Path) -> None:
    """Behaviour: named by the names in the file."""
    one, adapter = trained()
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[5]
    save_file({n: t for n, t in tensors.items() if n != name}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"lacks 1 of {len(tensors)} tensors: {name};"):
        merging.merge(one, adapter, tmp_path / "merged")


@pytest.mark.parametrize("lever", ["nf4_weights", "int8_weights"])
def test_merging_into_packed_weights_is_refused(lever: str, recipe: Callable[..., Any]) -> None:
    """Behaviour: PEFT would pack what was learned again."""
    one = recipe(model=TINY, method="lora", levers=[lever])
    with pytest.raises(LowresError, match="not merged into quantised weights"):
        one.method.merge(build(one).model)


def test_what_cannot_be_merged_is_refused_at_once(
    recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: all reasons in one message; nothing is loaded."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(InputError) as refusal:
        merging.merge(recipe(), tmp_path / "none", tmp_path / "full")
    texts = [p.text for p in refusal.value.problems]
    assert len(texts) == 2 and "no adapter" in texts[0] and "not empty" in texts[1]
