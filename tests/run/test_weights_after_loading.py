"""Weights that are wider than asked for, and types that change after loading, do not pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowres
from lowres.bridges import transformers
from lowres.core.errors import InputError, LowresError
from lowres.run import weights
from lowres.run.build import build
from tests.conftest import KINDS

TINY = {"checkpoint": "package:lowres/assets/tiny_lm"}


@pytest.mark.parametrize("lever", ["nf4_weights", "int8_weights", "bf16_weights", None])
def test_a_layer_that_was_not_packed_is_named(
    lever: str | None, recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: one of 42 layers is left in float32 by the loader; without that, nothing."""
    load = transformers.load_model
    place = "model.layers.3.mlp.up_proj"
    changes: Any = {"levers": [lever]} if lever else {}
    changes["model"] = TINY | ({} if lever else {"dtype": "bfloat16"})
    one = recipe(method="lora", objective="label_words", **changes)
    build(one)

    def forgetful(*arguments: Any) -> Any:
        model, fresh = load(*arguments)
        old = model.get_submodule(place)
        model.set_submodule(place, nn.Linear(old.in_features, old.out_features, bias=False))
        return model, fresh

    monkeypatch.setattr(transformers, "load_model", forgetful)
    with pytest.raises(LowresError, match=f"{place}.* takes 4.00 bytes a weight where"):
        build(one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lever", ["nf4_weights", "int8_weights", "bf16_weights", "fp16_weights"])
def test_what_the_levers_load_passes(
    lever: str, kind: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: with every kind's exceptions (T5's `wo`, heads made anew), and nothing is cast."""
    one = recipe(kind, method="lora", levers=[lever])
    built = build(one)
    assert weights.casts(built.loaded, built.model) is None


@pytest.mark.parametrize("lever", ["nf4_weights", "int8_weights"])
def test_nothing_is_widened_for_training_around_packed_weights(
    lever: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: norms, embeddings and the output stay in bfloat16, where the usual preparation
    for k-bit training makes float32 of them; the record has no word of a cast."""
    one = recipe(model=TINY | {"dtype": "bfloat16"}, method="lora", levers=[lever],
                 objective="label_words")  # fmt: skip
    built = build(one)
    for name, parameter in built.model.named_parameters():
        assert parameter.dtype != torch.float32 or "lora_" in name, name
    record = lowres.run(one, output_folder=tmp_path / "out", quiet=True, plan=False)
    assert not [e for e in record.events if e.kind == "cast"]


def test_what_is_widened_is_told_with_its_bytes(
    recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed form: norms of a model of 16 features in float32 are 64 bytes each."""
    one = recipe(model={"dtype": "bfloat16"}, method="lora")
    apply = type(one.method).apply

    def widening(self: Any, model: Any, blocks: Any) -> Any:
        model = apply(self, model, blocks)
        for name, module in model.named_modules():
            if name.endswith("final_layer_norm") and "layers" in name:
                module.float()
        return model

    monkeypatch.setattr(type(one.method), "apply", widening)
    built = build(one)
    told = weights.casts(built.loaded, built.model)
    assert told is not None
    assert told.startswith(f"cast: 6 tensors, {6 * 64} B: ")
    assert "layers.0.final_layer_norm.weight (bfloat16 to float32)" in told
    found = dict(weights.remarks(one, built.loaded, built.model, torch.device("cpu")))
    assert found == {"cast": told}


def test_weights_beyond_float16_are_refused(
    recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed form: 65504 is the largest number of float16."""
    load = transformers.load_model

    def large(*arguments: Any) -> Any:
        model, fresh = load(*arguments)
        weight = next(p for n, p in model.named_parameters() if n.endswith("fc1.weight"))
        weight.data = weight.data.float().index_fill(0, torch.tensor([0]), 7e4).to(weight.dtype)
        return model, fresh

    monkeypatch.setattr(transformers, "load_model", large)
    with pytest.raises(InputError, match=r"fc1\.weight has weights beyond float16's 65504"):
        build(recipe(method="lora", levers=["fp16_weights"]))
    build(recipe(method="lora", levers=["bf16_weights"]))
