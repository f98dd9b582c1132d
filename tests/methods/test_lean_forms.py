"""LoRA, DoRA, LoHa and PiSSA with less made and kept than PEFT's, and beside packed weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowres.bridges import bitsandbytes as bridge
from lowres.bridges import lora
from lowres.bridges.unpacking import unpacked, unpacked_rows
from lowres.core.delta import Delta, Tap
from lowres.core.errors import LowresError
from lowres.core.recompute import WideningLinear
from lowres.methods._butterfly import ButterflyDelta
from lowres.methods._kronecker import HypercomplexAdapter, KroneckerBeside, KroneckerDelta
from lowres.methods._low_rank import LowRank
from lowres.methods._masked import MaskedAdapter
from lowres.methods._principal import PrincipalDelta
from lowres.methods._token_gates import Gate
from tests.methods.adapted import kept_bytes
from tests.methods.test_of_peft import IDS, adapt, gpt2, llama, logits, method, train, trained

FORMS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4"},
    "nf4, plain scales": {"quant_type": "nf4", "compress_statistics": False},
    "fp4": {"quant_type": "fp4"},
    "int8": {},
}


def packed_layer(plain: nn.Linear, form: str) -> Any:
    """A settled layer with the weights of a plain one in few bits."""
    inputs, outputs = plain.in_features, plain.out_features
    bias = plain.bias is not None
    if form == "int8":
        layer: Any = bnb.nn.Linear8bitLt(inputs, outputs, bias, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(inputs, outputs, bias, torch.float32, **FORMS[form])
    layer.load_state_dict(plain.state_dict())
    layer = layer.requires_grad_(False).to("cpu")
    bridge.settle(layer)
    return layer


def packed(form: str) -> tuple[Any, Any]:
    """A model whose blocks are in few bits, and one with what they stand for."""
    model, twin = llama(), llama()
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and ".layers." in path:
            model.set_submodule(path, packed_layer(layer, form))
            twin.get_submodule(path).weight.data = unpacked(model.get_submodule(path)).float()
    setattr(model, "is_loaded_in_8bit" if form == "int8" else "is_loaded_in_4bit", True)
    return model, twin


def biased(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits as they are in training, and the gradient of each trained parameter."""
    model.zero_grad()
    scores = model(IDS).logits
    nn.functional.cross_entropy(scores.flatten(0, 1), IDS.flatten()).backward()
    return scores.detach(), {n: p.grad.clone() for n, p in trained(model).items()}  # type: ignore[union-attr]


def by_peft(base: nn.Module, folder: Path) -> Any:
    """What PEFT alone makes of an adapter's file."""
    model: Any = peft.PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    assert not any(isinstance(m, WideningLinear) for m in model.modules())
    return model


def same(ours: Any, theirs: Any, close: float) -> None:
    """Logits and gradients of two models, beside the largest of each."""
    (mine, my_gradients), (wanted, gradients_wanted) = gradients(ours), gradients(theirs)
    assert my_gradients.keys() == gradients_wanted.keys()
    pairs = [(mine, wanted), *((my_gradients[n], g) for n, g in gradients_wanted.items())]
    for one, other in pairs:
        assert (one - other).abs().max() <= close * other.abs().max()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_dora_is_peft_s(make: Callable[[], Any], dtype: Any, close: float, tmp_path: Path) -> None:
    """Reference: PEFT's DoRA of the saved file, by logits and gradients; GPT-2 with transposed
    weights and biases. Tolerance: rounding of sums."""
    base = biased(make()).to(dtype)
    ours = adapt(copy.deepcopy(base), method("dora"))
    train(ours, 5)
    ours.save_pretrained(tmp_path)
    assert (logits(ours) - logits(base)).abs().max() > 0.01
    same(ours, by_peft(base, tmp_path), close)


@pytest.mark.parametrize("form", ["nf4", "nf4, plain scales", "int8"])
def test_dora_around_packed_weights_is_peft_s_over_what_they_stand_for(
    form: str, tmp_path: Path
) -> None:
    """Reference: PEFT's DoRA of the saved file beside the unpacked weights. Tolerance: rounding of
    sums in float32; the start is the base, bit for bit."""
    base, twin = packed(form)
    start = gradients(adapt(copy.deepcopy(twin), method("lora")))[0]
    ours = adapt(base, method("dora"))
    torch.testing.assert_close(gradients(ours)[0], start, atol=1e-6, rtol=1e-5)
    with ours.disable_adapter():
        plain = ours(IDS).logits
    assert torch.equal(gradients(ours)[0], plain)
    train(ours, 5)
    ours.save_pretrained(tmp_path)
    same(ours, by_peft(twin, tmp_path), 1e-4)


def test_dora_lives_as_peft_s_does(tmp_path: Path) -> None:
    """Reference: PEFT's, with another adapter put in later and both at work, switched off, merged
    and taken out again, with blocks recomputed, and without a gradient."""
    ours = adapt(llama(), method("dora"))
    train(ours, 5)
    ours.save_pretrained(tmp_path)
    theirs = by_peft(llama(), tmp_path)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    for model in (ours, theirs):
        torch.manual_seed(3)
        model.add_adapter("other", config)
    for active in (["default", "other"], ["other"], ["default"]):
        for model in (ours, theirs):
            model.base_model.set_adapter(active)
        assert torch.allclose(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6), active
        same(ours, theirs, 2e-5)
    with ours.disable_adapter():
        assert torch.equal(logits(ours), logits(llama()))
    whole = gradients(ours)
    ours.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    ours.train()
    for one, other in zip(gradients(ours)[1].values(), whole[1].values(), strict=True):
        assert torch.equal(one, other)
    ours.get_base_model().gradient_checkpointing_disable()
    before = logits(ours.eval())
    ours.merge_adapter()
    assert torch.allclose(logits(ours), before, rtol=1e-4, atol=1e-5)
    ours.unmerge_adapter()
    assert torch.allclose(logits(ours), before, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """The most bytes of floats that any operation newly takes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self._known = 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._known |= {a.untyped_storage().data_ptr() for a in args if torch.is_tensor(a)}
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if torch.is_tensor(one) and one.is_floating_point():
                storage = one.untyped_storage()
                if storage.data_ptr() not in self._known:
                    self.seen = max(self.seen, storage.nbytes())
        return out


def largest(model: nn.Module, width: int) -> int:
    with Largest() as mode:
        model(torch.ones(2, width)).sum().backward()
    return mode.seen


def test_dora_makes_nothing_as_large_as_a_weight() -> None:
    """Closed form: slices of 2^20 elements, of a weight of 2^21; PEFT's passes make the whole."""
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=["0"])
    model: Any = peft.get_peft_model(nn.Sequential(nn.Linear(1024, 2048)), config)  # type: ignore[arg-type]
    assert largest(model, 1024) == 2**21 * 4
    lora.settle(model)
    assert largest(model, 1024) == 2**20 * 4


def test_dora_keeps_its_input_the_small_product_and_the_layer_s_own_output() -> None:
    """Closed form: 2 bytes an element of x and of W x, 4 of A x and of each norm."""
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=["q"], init_lora_weights=False)
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("q", nn.Linear(64, 48, dtype=torch.bfloat16))
    model: Any = peft.get_peft_model(base, config)  # type: ignore[arg-type]
    lora.settle(model)
    x = torch.randn(2, 8, 64, dtype=torch.bfloat16)
    assert kept_bytes(model, x) == 16 * (64 * 2 + 48 * 2 + 4 * 4) + 48 * 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(96, 128), (41, 24), (20, 200)])
def test_rows_are_unpacked_in_slices(form: str, shape: tuple[int, int]) -> None:
    """Reference: the whole, bit for bit, also where rows are no multiple of a block of 64; a slice
    is small, but for what is packed together."""
    torch.manual_seed(0)
    layer = packed_layer(nn.Linear(shape[1], shape[0]), form)
    slices = list(unpacked_rows(layer, 600))
    assert torch.equal(torch.cat(slices), unpacked(layer))
    assert len(slices) > 1
    assert max(part.numel() for part in slices) <= 600 + 8 * shape[1]


def test_a_layer_in_8_bits_outlives_that_peft_reads_its_matrix() -> None:
    """Behaviour: before its first use and after; PEFT then sets a parameter without scales."""
    torch.manual_seed(0)
    layer, x = packed_layer(nn.Linear(32, 24), "int8"), torch.randn(3, 32)
    outputs = []
    for _ in range(3):
        dequantize_module_weight(layer)
        outputs.append(layer(x))
    wanted = nn.functional.linear(x, unpacked(layer), layer.bias)
    for out in outputs:
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-4)


def test_loha_around_4_bits_is_peft_s_over_what_they_stand_for(tmp_path: Path) -> None:
    """Reference: PEFT's LoHa of the saved file beside the unpacked weights; float32 rounding."""
    base, twin = packed("nf4")
    with torch.no_grad():
        plain = base(IDS).logits
    ours = adapt(base, method("loha"))
    assert torch.equal(logits(ours), plain)
    train(ours, 5)
    ours.save_pretrained(tmp_path)
    assert (logits(ours) - plain).abs().max() > 0.01
    same(ours, by_peft(twin, tmp_path), 1e-4)
    with pytest.raises(LowresError, match="quantised; load it on the base in 16 bits"):
        ours.merge_and_unload()


def test_loha_around_4_bits_drops_the_rows_that_peft_s_does() -> None:
    """Reference: PEFT's, from the same seed, over the unpacked weights."""
    config = peft.LoHaConfig(
        r=4, target_modules=["q_proj"], rank_dropout=0.5, init_weights=False
    )  # fmt: skip
    outs = []
    for base in packed("nf4"):
        torch.manual_seed(0)
        model = peft.get_peft_model(base, copy.deepcopy(config)).train()
        outs.append(model(IDS).logits)
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_pissa_takes_the_principal_part_of_what_packed_weights_stand_for(form: str) -> None:
    """Closed form: the other singular values are left; the start is the base, bit for bit, and it
    learns."""
    base, _ = packed(form)
    plain = base(IDS).logits
    model = adapt(base, method("pissa", rank=3, iterations=0))
    start = gradients(model)[0]
    assert torch.equal(start, plain)
    for layer in (m for m in model.modules() if hasattr(m, "lowres_delta_parts")):
        (delta,) = layer.deltas("default")
        weight = unpacked(layer.base_layer).float()
        rest = torch.linalg.svdvals(weight - (delta.up @ delta.down).detach())
        wanted = torch.linalg.svdvals(weight)[3:]
        torch.testing.assert_close(rest[: len(wanted)], wanted, atol=1e-6, rtol=1e-4)
    train(model)
    assert not torch.allclose(gradients(model)[0], start, atol=1e-3)


class Three(nn.Module):
    """Queries, keys and values of one input in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in "qkv":
            setattr(self, name, nn.Linear(64, 64, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.q(x) + self.k(x) + self.v(x)
        return out


@pytest.mark.parametrize("autocast", [False, True])
def test_layers_with_the_same_input_keep_it_once(autocast: bool) -> None:
    """Reference: PEFT's LoRA, which keeps a copy for each. Closed form: three copies, of 4 bytes an
    element or of autocast's 2, for the input itself of 2; gradients are equal bit for bit."""
    config = peft.LoraConfig(r=4, target_modules=["q", "k", "v"], init_lora_weights=False)
    kept, grads = [], []
    for lean in (False, True):
        torch.manual_seed(1)
        model: Any = peft.get_peft_model(Three(), config)  # type: ignore[arg-type]
        if lean:
            lora.settle(model)
        torch.manual_seed(2)
        # Not a leaf, whose bytes nobody but the layers has to keep.
        leaf = torch.randn(2, 8, 64, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            kept.append(kept_bytes(lambda model=model, leaf=leaf: model(leaf.tanh())))
            model(leaf.tanh()).float().square().sum().backward()
        grads.append([leaf.grad, *(p.grad for p in trained(model).values())])
    elements = 2 * 8 * 64
    # tanh keeps its own output, which is the input.
    assert kept[0] - kept[1] == 3 * elements * (2 if autocast else 4)
    assert len(grads[0]) == 7
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_lora_in_16_bits_learns_bit_for_bit_as_peft_s(tmp_path: Path) -> None:
    """Reference: PEFT's of the saved file, over bfloat16 without autocast; it keeps more."""
    ours = adapt(llama().bfloat16(), method("lora", targets="all-linear"))
    train(ours)
    ours.save_pretrained(tmp_path)
    theirs = by_peft(llama().bfloat16(), tmp_path)
    (mine, my_gradients), (wanted, gradients_wanted) = gradients(ours), gradients(theirs)
    assert torch.equal(mine, wanted)
    assert all(torch.equal(my_gradients[n], g) for n, g in gradients_wanted.items())
    bytes_ = [kept_bytes(lambda m=m: m(IDS).logits) for m in (ours, theirs)]
    assert bytes_[0] < bytes_[1]


@pytest.mark.parametrize("trains", [True, False])
def test_a_widening_layer_is_one_over_the_wide_copy(trains: bool) -> None:
    """Reference: nn.Linear over the copy, output and gradients bit for bit. Closed form: for
    backward the narrow input, and nothing where the weight is not trained."""
    torch.manual_seed(0)
    wide = nn.Linear(32, 16)
    wide.weight.requires_grad_(trains)
    narrow = WideningLinear(32, 16)
    narrow.load_state_dict(wide.state_dict())
    narrow.weight.requires_grad_(trains)
    found = []
    for layer, x in ((wide, torch.randn(2, 5, 32).bfloat16()), (narrow, None)):
        x = (found[0][1] if x is None else x).detach().clone().requires_grad_()
        out = layer(x.float() if layer is wide else x)
        out.square().sum().backward()
        found.append([out, x, x.grad, layer.weight.grad, layer.bias.grad])
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    x = torch.ones(2, 5, 32, dtype=torch.bfloat16)
    assert kept_bytes(narrow, x) == (x.nbytes if trains else 0)


def test_our_own_low_rank_product_keeps_the_narrow_input() -> None:
    """Closed form: the input in 2 bytes and A x in 4."""
    delta = LowRank(nn.Linear(64, 64), {"rank": 2, "alpha": 2})
    x = torch.ones(8, 64, dtype=torch.bfloat16)
    assert kept_bytes(delta.added, x) == 8 * 64 * 2 + 8 * 2 * 4


def lean() -> dict[str, Callable[[nn.Linear], Callable[[torch.Tensor], torch.Tensor]]]:
    """What is added at one layer in 16 bits, by its input: forms whose own parts are in 32."""
    ready = {"reduction": 4, "activation": "gelu"}

    def tapped(base: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        tap = Tap(base, {})
        last = KroneckerBeside(base, {"scale": 1, "residual": True}, [tap])

        def run(x: torch.Tensor) -> torch.Tensor:
            tap.change(x, x)
            return last.change(x, x)

        return run

    def at(cls: type[Delta], **settings: Any) -> Callable[[nn.Linear], Any]:
        def made(base: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
            delta = cls(base, settings)
            return lambda x: delta.change(x, x)

        return made

    return {
        "pissa": at(PrincipalDelta, rank=4, iterations=0),
        "krona": at(KroneckerDelta, rank=None, scale=1.0),
        "krona_res": tapped,
        "compacter": at(HypercomplexAdapter, terms=4, rank=1, **ready),
        "sparse_adapter": at(MaskedAdapter, sparsity=0.5, score="magnitude", **ready),
    }


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", lean())
def test_layers_in_16_bits_keep_an_input_that_they_share_once(name: str, autocast: bool) -> None:
    """Closed form: two layers keep nothing but their input of 2 bytes, neither a wide copy of it
    nor what lies between."""
    torch.manual_seed(0)
    layers = [lean()[name](nn.Linear(64, 64).bfloat16()) for _ in range(2)]
    x = torch.randn(8, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert (
            kept_bytes(lambda x: torch.stack([layer(x) for layer in layers]).sum(0), x) == x.nbytes
        )


def test_a_gate_keeps_its_narrow_input_and_what_it_gives() -> None:
    """Closed form: 2 bytes an element of the input, 4 of each gate."""
    gate = Gate(64, torch.device("cpu"))
    x = torch.ones(8, 64, dtype=torch.bfloat16)
    assert kept_bytes(gate, x) == 8 * 64 * 2 + 8 * 4


def test_a_rotation_keeps_its_narrow_input_and_what_is_scaled() -> None:
    """Closed form: 2 bytes an element of the input and of what is rotated, 4 of each factor less 1;
    nothing of the factors' own products."""
    delta = ButterflyDelta(
        nn.Linear(64, 64, bias=False).bfloat16(), {"block_size": 8, "factors": 2}
    )
    x = torch.randn(8, 64).bfloat16()
    assert kept_bytes(lambda x: delta.around(lambda y: y, x), x) == 2 * x.nbytes + 64 * 4
