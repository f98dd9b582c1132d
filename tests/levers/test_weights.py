"""Weights in 4 and 8 bits: their bytes and values, what they refuse, training around them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowres
from lowres.bridges import bitsandbytes as bridge
from lowres.core.errors import InputError, OutOfTime
from lowres.making.build import build
from lowres.memory.live import LiveBytes
from tests.conftest import KINDS

TINY = {"checkpoint": "package:lowres/assets/tiny_lm"}
FORMS = {
    "nf4": {"name": "nf4_weights"},
    "nf4, plain scales": {"name": "nf4_weights", "double_quantisation": False},
    "fp4": {"name": "nf4_weights", "kind": "fp4"},
    "int8": {"name": "int8_weights"},
}
# Appendix E of the QLoRA paper.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def quantised(model: nn.Module) -> dict[str, nn.Linear]:
    """Path to layer, for those with packed weights."""
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) in (bridge.FrozenLinear4bit, bridge.FrozenLinear8bit)
    }


def closed_form(form: str, rows: int, columns: int) -> int:
    """Bytes of one matrix: packed weights, scales, code books."""
    weights = rows * columns
    if form == "int8":
        return weights + 4 * rows
    scales, book = -(-weights // 64), 16 * 4
    if form == "nf4, plain scales":
        return weights // 2 + 4 * scales + book
    return weights // 2 + scales + 4 * -(-scales // 256) + 4 + 256 * 4 + book


@pytest.mark.parametrize("form", FORMS)
def test_each_matrix_of_the_blocks_takes_the_bytes_of_the_closed_form(
    form: str, recipe: Callable[..., Any]
) -> None:
    """Closed form: of 4 bits 0.5 bytes a weight and a scale for each 64, themselves in 8 bits with
    a scale for each 256; of 8 bits 1 byte a weight and a scale a row."""
    model = build(recipe(model=TINY, method="lora", levers=[FORMS[form]])).model
    layers = quantised(model)
    assert len(layers) == 6 * 7
    for path, layer in layers.items():
        state = bridge.quantisation_state(layer)
        held = layer.weight.nbytes + sum(t.nbytes for t in state)
        assert held == closed_form(form, layer.out_features, layer.in_features), path
        assert len({t.data_ptr() for t in state}) == len(state)
        assert bridge.is_quantised(layer.weight)
        assert bridge.element_count(layer.weight) == layer.out_features * layer.in_features


@pytest.mark.parametrize("kind", [*KINDS, "llama"])
@pytest.mark.parametrize("lever", ["nf4_weights", "int8_weights"])
@pytest.mark.parametrize("objective", ["classification", "label_words"])
def test_blocks_are_quantised_and_nothing_else_is(
    objective: str, lever: str, kind: str, recipe: Callable[..., Any]
) -> None:
    """Behaviour: heads (new ones too), poolers, embeddings and norms keep their type, and no
    parameter beside the head is reported as made anew."""
    changes: Any = {"model": TINY} if kind == "llama" else {}
    base = "decoder" if kind == "llama" else kind
    built = build(recipe(base, method="lora", objective=objective, levers=[lever], **changes))
    blocks = built.learner.blocks
    plain = {
        p.replace("base_model.model.", "").replace(".base_layer", "")
        for p in quantised(built.model)
    }
    assert plain and all(path.startswith(tuple(f"{b}." for b in blocks.names)) for path in plain)
    for name, parameter in built.model.named_parameters():
        if not bridge.is_quantised(parameter):
            assert parameter.dtype == torch.float32, name
            inside = ".base_layer.weight" in name or "original_module" in name
            # T5 asks transformers to leave its `wo` alone.
            assert not inside or "lora" in name or ".wo." in name or "original_module" in name, name
    assert bool(blocks.head) == (objective == "classification")


def test_nf4_holds_the_nearest_of_the_papers_sixteen_values(recipe: Callable[..., Any]) -> None:
    """Reference: sections 2 and 3 of the QLoRA paper by hand. Exact but for values halfway between
    two; the scales are float32."""
    import bitsandbytes

    plain = build(recipe(model=TINY, method="lora")).model
    packed = build(recipe(model=TINY, method="lora", levers=[FORMS["nf4, plain scales"]])).model
    path, layer = next(iter(quantised(packed).items()))
    weight = plain.get_parameter(f"{path}.weight").detach()
    blocks = weight.view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    book = torch.tensor(NF4)
    nearest = book[((blocks / scale)[..., None] - book).abs().argmin(-1)] * scale
    held = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    off = (held.view(-1, 64) - nearest).abs() > 1e-6
    assert float(off.float().mean()) < 1e-3
    assert float((held - weight).norm() / weight.norm()) == pytest.approx(0.09, abs=0.01)


@pytest.mark.parametrize("shape", [(32, 16), (64, 48), (7, 30), (5, 15), (96, 384)])
@pytest.mark.parametrize("double", [False, True])
def test_four_bits_stand_for_their_value_times_the_scale_of_their_block(
    shape: tuple[int, int], double: bool
) -> None:
    """Closed form, with rows that are no multiple of a block too: alone, and in the product of a
    layer."""
    import bitsandbytes
    from bitsandbytes import functional

    torch.manual_seed(0)
    weight_oi = torch.randn(shape)
    packed, state = functional.quantize_4bit(
        weight_oi, quant_type="nf4", blocksize=64, compress_statistics=double
    )
    nibbles = torch.stack([packed >> 4, packed & 15], -1).flatten()[: weight_oi.numel()].long()
    scales = weight_oi.flatten().split(64)
    wide = torch.cat([part.abs().amax().expand(len(part)) for part in scales])
    expected = (torch.tensor(NF4)[nibbles] * wide).view(shape)
    found = functional.dequantize_4bit(packed, state)
    # Scales in 8 bits are off by up to 1 in 64 of the largest.
    assert torch.allclose(found, expected, atol=0.05 if double else 1e-5)
    x = torch.randn(3, shape[1])
    product = bitsandbytes.matmul_4bit(x, packed, state)
    assert torch.allclose(product, x @ found.T, atol=1e-4)


def test_int8_holds_each_row_in_127_steps(recipe: Callable[..., Any]) -> None:
    """Reference: vector-wise quantisation, section 3.1 of the LLM.int8() paper, by hand; its 16-bit
    arithmetic may round the other way, by one step."""
    plain = build(recipe(model=TINY, method="lora")).model
    packed = build(recipe(model=TINY, method="lora", levers=["int8_weights"])).model
    path, layer = next(iter(quantised(packed).items()))
    weight = plain.get_parameter(f"{path}.weight").detach()
    (scale,) = bridge.quantisation_state(layer)
    assert torch.allclose(scale, weight.abs().amax(1), rtol=1e-3)
    steps = (weight / weight.abs().amax(1, keepdim=True) * 127).round()
    assert float((layer.weight.data - steps).abs().max()) <= 1
    assert float((layer.weight.data != steps).float().mean()) < 0.05


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_a_linear_layer_with_the_unpacked_weights(
    form: str, dtype: torch.dtype
) -> None:
    """Reference: nn.Linear over the dequantised weights, output and input gradient, with autocast
    and without, in training. Tolerance: the order of a sum in `dtype`."""
    layer, unpacked = one_layer(form, dtype)
    layer.train()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outs, grads = [], []
            for one in (layer, unpacked):
                x = torch.linspace(-1, 1, 5 * 128).view(1, 5, 128).to(dtype).requires_grad_()
                out = one(x)
                out.float().square().sum().backward()
                outs.append(out)
                grads.append(x.grad)
        close = (
            {"rtol": 1e-4, "atol": 1e-5}
            if outs[0].dtype == torch.float32
            else {"rtol": 0.05, "atol": 0.05}
        )
        assert outs[0].dtype == outs[1].dtype
        assert torch.allclose(outs[0], outs[1], **close)
        assert torch.allclose(grads[0], grads[1], rtol=close["rtol"], atol=20 * close["atol"])
    assert layer.bias.dtype == dtype


def one_layer(form: str, dtype: torch.dtype) -> tuple[nn.Linear, nn.Linear]:
    """A quantised layer 128 to 96, settled, and a plain one over its unpacked weights."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    plain = nn.Linear(128, 96, dtype=dtype).requires_grad_(False)
    if form == "int8":
        layer = bnb.nn.Linear8bitLt(128, 96, has_fp16_weights=False, threshold=6.0)
    else:
        layer = bnb.nn.Linear4bit(
            128, 96, compute_dtype=dtype, compress_statistics="plain" not in form,
            quant_type="fp4" if form == "fp4" else "nf4",
        )  # fmt: skip
    layer.load_state_dict(plain.state_dict())
    layer = layer.to(dtype).requires_grad_(False).to("cpu")
    bridge.settle(layer)
    if form == "int8":
        values = layer.weight.data.float() * bridge.quantisation_state(layer)[0][:, None] / 127
    else:
        values = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    plain.weight.data = values.to(dtype)
    return layer, plain


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("training", [True, False])
def test_recomputing_frees_the_inputs_of_quantised_layers(training: bool, form: str) -> None:
    """Closed form: after a checkpointed forward pass only the block's output is there (its input is
    the caller's). bitsandbytes' own 8-bit layer keeps every input. The path of an evaluation is the
    one that CUDA trains by."""
    layers = nn.ModuleList(one_layer(form, torch.float32)[0] for _ in range(4))

    def block(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = nn.functional.pad(torch.tanh(layer(x)), (0, 32))
        return x

    layers.train(training)
    block(torch.ones(2, 128))  # 8-bit layers take their scales over at their first use
    x = torch.randn(64, 128, requires_grad=True)
    states = [t for layer in layers for t in bridge.quantisation_state(layer)]
    with LiveBytes("cpu", [x, *layers.parameters(), *states]) as counted:
        before = counted.now_bytes
        out = checkpoint(block, x, use_reentrant=False)
        assert counted.now_bytes == before + out.nbytes
        out.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("lever", ["nf4_weights", "int8_weights"])
def test_what_cannot_be_is_refused_with_the_choice_that_can(
    lever: str, recipe: Callable[..., Any]
) -> None:
    """Behaviour: all reasons at once, before anything is loaded."""
    with pytest.raises(InputError) as refusal:
        recipe(method="full", model={"init": "random"}, levers=["nf4_weights", "int8_weights"])
    texts = [str(p) for p in refusal.value.problems if f"'{lever}':" in str(p)]
    assert len(texts) == 3
    assert any("lora" in t for t in texts)
    assert any("model.init is random" in t for t in texts)
    assert any("drop one of the two" in t for t in texts)


@pytest.mark.parametrize(
    ("lever", "precision", "dtype"),
    [
        pytest.param("nf4_weights", "bf16", "float32", marks=pytest.mark.slow),
        ("int8_weights", "no", "float32"),
        pytest.param("nf4_weights", "no", "float32", marks=pytest.mark.slow),
        pytest.param("nf4_weights", "bf16", "bfloat16", marks=pytest.mark.slow),
        pytest.param("int8_weights", "bf16", "float32", marks=pytest.mark.slow),
        pytest.param("int8_weights", "bf16", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_and_resumed_equals_the_uninterrupted_one(
    lever: str, precision: str, dtype: str, raw_recipe: Callable[..., Any], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Reference: the uninterrupted run, bit for bit: losses, weights, scores. With recomputed
    blocks and states in 8 bits. Nothing is logged for each use of a layer."""
    keys = raw_recipe(
        model=TINY | {"dtype": dtype}, levers=[lever, "gradient_checkpointing"],
        method={"name": "lora", "rank": 16, "targets": "all-linear"},
        optimizer={"name": "adamw_8bit", "lr": 2e-3},
        loop={"precision": precision, "save_every": 1, "eval_every": 2},
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        whole = lowres.run(
            lowres.load_recipe(keys), output_folder=tmp_path / "a", quiet=True, plan=False
        )
    assert whole.outcome == "ok"
    assert [r for r in caplog.records if r.name.startswith("bitsandbytes")] == []
    late = lowres.load_recipe(keys | {"budget": {"minutes": 1e-6}})
    with pytest.raises(OutOfTime):
        lowres.run(late, output_folder=tmp_path / "b", quiet=True, plan=False)
    resumed = lowres.run(
        lowres.load_recipe(keys),
        output_folder=tmp_path / "b",
        resume="latest",
        quiet=True,
        plan=False,
    )
    assert resumed.losses == whole.losses
    assert [s.value for s in resumed.scores] == [s.value for s in whole.scores]
    ours, theirs = (
        load_file(tmp_path / n / "model" / "adapter_model.safetensors") for n in ("b", "a")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_on_cuda_they_are_loaded_where_they_are_trained(
    form: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: every tensor is on the device before accelerate prepares the model; a run ends."""
    one = recipe(model=TINY | {"dtype": "bfloat16"}, method="lora", levers=[FORMS[form]])
    model = build(one).model
    held = [t for layer in quantised(model).values() for t in bridge.quantisation_state(layer)]
    assert {t.device.type for t in (*held, *model.parameters(), *model.buffers())} == {"cuda"}
    assert lowres.run(one, output_folder=tmp_path / "out", quiet=True, plan=False).outcome == "ok"
