"""Weights that are wider than asked for, and types that change after loading, do not pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowres
from lowres.bridges import peft, transformers
from lowres.bridges.bitsandbytes import asked_bytes, quantisation_state
from lowres.core.errors import InputError, LowresError
from lowres.making import weights
from lowres.making.build import build
from lowres.run import remarks
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


@pytest.mark.parametrize("lever", ["nf4_weights", "int8_weights", "bf16_weights"])
@pytest.mark.parametrize("place", ["model.embed_tokens", "lm_head"])
def test_what_is_wider_outside_the_blocks_is_named(
    place: str, lever: str, recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: embedding or head in float32 beside packed or narrow blocks, where 16 bits were
    asked for."""
    load = transformers.load_model
    dtype = {} if lever == "bf16_weights" else {"dtype": "bfloat16"}
    one = recipe(method="lora", objective="label_words", levers=[lever], model=TINY | dtype)
    build(one)

    def widening(*arguments: Any) -> Any:
        model, fresh = load(*arguments)
        layer = model.get_submodule(place)
        layer.weight = nn.Parameter(layer.weight.detach().float())
        return model, fresh

    monkeypatch.setattr(transformers, "load_model", widening)
    with pytest.raises(LowresError, match=f"^{place} takes 4.00 bytes a weight where 2.00 were"):
        build(one)


def test_a_head_made_anew_keeps_the_type_of_the_model(
    recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: it is no matrix of the checkpoint, and wide all the same where it is float32."""
    load = transformers.load_model
    one = recipe(method="lora", objective="classification", levers=["nf4_weights"],
                 model=TINY | {"dtype": "bfloat16"})  # fmt: skip
    build(one)

    def widening(*arguments: Any) -> Any:
        model, fresh = load(*arguments)
        assert fresh == ["score.weight"]
        model.score.float()
        return model, fresh

    monkeypatch.setattr(transformers, "load_model", widening)
    with pytest.raises(LowresError, match="score takes 4.00 bytes a weight where 2.00 were"):
        build(one)


@pytest.mark.parametrize("features", [16, 512])
def test_scales_that_were_not_packed_are_named(
    features: int, recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed form: 512 x 512 weights have 4096 scales, in 32 bits 16 KiB and in 8 bits 5188 bytes;
    those of 16 x 16 weights are fewer bytes in 32 bits than with a second code book."""
    from bitsandbytes.nn import Linear4bit

    load = transformers.load_model
    place = "model.layers.3.mlp.up_proj"

    def exchanging(double: bool) -> Any:
        def loads(*arguments: Any) -> Any:
            model, fresh = load(*arguments)
            packed = Linear4bit(features, features, bias=False, compress_statistics=double,
                                quant_type="nf4")  # fmt: skip
            model.set_submodule(place, packed.to("cpu"))
            return model, fresh

        return loads

    one = recipe(method="lora", objective="label_words", levers=["nf4_weights"], model=TINY)
    monkeypatch.setattr(transformers, "load_model", exchanging(double=True))
    built = build(one)
    layer = peft.bare(peft.unwrap_adapted(built.model).get_submodule(place))
    held = sum(t.nbytes for t in (layer.weight, *quantisation_state(layer)))
    config = built.model.config.quantization_config
    assert held == asked_bytes(layer, config)
    if features == 512:
        assert held == 512 * 512 // 2 + 4096 + 4 * 16 + 4 * 16 + 4 * 256 + 4
    monkeypatch.setattr(transformers, "load_model", exchanging(double=False))
    said = "takes 0.56 bytes a weight where 0.52 were" if features == 512 else "held in 32 bits"
    with pytest.raises(LowresError, match=said):
        build(one)
    plain = {"name": "nf4_weights", "double_quantisation": False}
    build(recipe(method="lora", objective="label_words", levers=[plain], model=TINY))


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
    recipe: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Closed form: norms of a model of 16 features in float32 are 64 bytes each. The record names
    them all, the screen five and how many more there are."""
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
    assert told[0] == f"cast: 6 tensors, {6 * 64} B: " and len(told[1]) == 6
    assert all(each.endswith(" (bfloat16 to float32, 64 B)") for each in told[1])
    found = list(remarks.of_weights(one, built.loaded, built.model, torch.device("cpu")))
    assert found == [("cast", *told)]
    record = lowres.run(one, output_folder=tmp_path / "out", plan=False)
    (event,) = [e.text for e in record.events if e.kind == "cast"]
    assert event == told[0] + ", ".join(told[1])
    said = capsys.readouterr()
    shown = "".join([said.out, said.err])
    assert told[0] in shown and told[1][4] in shown and told[1][5] not in shown
    assert f"{told[1][4]} and 1 more" in shown


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
