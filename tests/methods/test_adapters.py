"""Bottleneck adapters of every form: their mathematics, counts, sharing, models that they serve."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowres.bridges.blocks import map_blocks
from lowres.bridges.peft_tuner import DeltaConfig
from lowres.core import registry
from lowres.core.delta import Delta, Tap
from lowres.core.errors import InputError
from lowres.making.build import build
from lowres.methods._bottleneck import ParallelAdapter, SerialAdapter
from lowres.methods._kronecker import (
    Hypercomplex,
    HypercomplexAdapter,
    Kronecker,
    KroneckerBeside,
    KroneckerDelta,
    near_square,
)
from lowres.methods._masked import MaskedAdapter, MaskedLinear
from tests.conftest import tiny_config

CPU = torch.device("cpu")
WIDTHS: dict[str, dict[str, Any]] = {
    "houlsby": {"reduction": 4},
    "pfeiffer": {"reduction": 4},
    "parallel": {"reduction": 4},
    "scaled_parallel": {"reduction": 4},
    "sparse_adapter": {"reduction": 2},
    "compacter": {"reduction": 2},
    "compacter_pp": {"reduction": 2},
    "krona": {},
    "krona_block": {},
    "krona_res": {},
}
"""Every method of the family, with bottlenecks of several units in a model of 16 features."""


def filled(module: nn.Module) -> Any:
    """In float64 and far from its start, where much would be zero."""
    module = module.double()
    for parameter in module.parameters():
        parameter.data.normal_()
    return module


def family(name: str) -> Any:
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1}
    if name == "gpt2":
        sizes |= {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        return AutoModelForCausalLM.from_config(GPT2Config(**sizes, eos_token_id=2)).eval()
    if name == "llama":
        sizes |= {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, eos_token_id=2)).eval()
    return OPTForCausalLM(tiny_config("decoder")).eval()


def part_of(method: str, **fields: Any) -> Any:
    return registry.load("method", method)(**fields)


def adapted(model: Any, method: str, **fields: Any) -> Any:
    return part_of(method, **(WIDTHS[method] | fields)).apply(model, map_blocks(model))


def deltas_of(model: nn.Module, kind: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def trained_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


IDS = torch.tensor([[1, 5, 9, 3, 7], [1, 8, 2, 6, 4]])


# -- Kronecker products


@pytest.mark.parametrize("rank", [None, 1, 2, 50])
@pytest.mark.parametrize("sizes", [(12, 12), (48, 30), (7, 20), (16, 13)])
def test_a_kronecker_product_by_reshaping_is_the_dense_one(
    sizes: tuple[int, int], rank: int | None
) -> None:
    """Reference: x times the matrix that torch.kron builds, with its gradients, in float64."""
    product = filled(Kronecker(*sizes, rank, CPU))
    x = torch.randn(2, 3, sizes[0], dtype=torch.float64, requires_grad=True)
    second = product.second[0]
    for further in list(product.second)[1:]:
        second = second @ further
    weight = torch.kron(product.first, second)
    assert torch.allclose(product.dense(), weight)
    assert weight.shape == (sizes[1], sizes[0])
    toward = torch.randn(2, 3, sizes[1], dtype=torch.float64)
    asked = [x, *product.parameters()]
    found = torch.autograd.grad((product(x) * toward).sum(), asked)
    wanted = torch.autograd.grad((F.linear(x, weight) * toward).sum(), asked)
    assert torch.allclose(product(x), F.linear(x, weight))
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_factors_have_the_sizes_that_pefts_lokr_gives_them() -> None:
    """Reference: PEFT's factorization with factor -1, each size below 400 and those of models."""
    from peft.tuners.lokr.layer import factorization

    for size in [*range(2, 400), 768, 896, 1024, 2560, 4096, 5120, 11008]:
        assert near_square(size) == factorization(size, -1), size


@pytest.mark.parametrize(("sizes", "rank"), [((64, 64), 2), ((48, 64), 2), ((64, 24), 8)])
def test_krona_is_pefts_lokr_with_the_same_factors(sizes: tuple[int, int], rank: int) -> None:
    """Reference: LoKr of decompose_factor -1 and alpha = r s, before and after its merge."""
    from peft import LoKrConfig, get_peft_model

    torch.manual_seed(0)
    base = nn.Linear(*sizes).double()
    wrapped = nn.Sequential()
    wrapped.add_module("q", copy.deepcopy(base))
    config = LoKrConfig(r=rank, alpha=3 * rank, target_modules=["q"], init_weights=False)
    peer: Any = get_peft_model(wrapped, config).double()
    delta = filled(KroneckerDelta(base, {"rank": rank, "scale": 3.0}))
    held = {n.split(".")[-2]: p for n, p in peer.named_parameters() if "lokr" in n}
    delta.product.first.data.copy_(held["lokr_w1"])
    seconds = [held[n] for n in ("lokr_w2", "lokr_w2_a", "lokr_w2_b") if n in held]
    assert [p.shape for p in delta.product.second] == [p.shape for p in seconds]
    for mine, theirs in zip(delta.product.second, seconds, strict=True):
        mine.data.copy_(theirs)
    x = torch.randn(2, 5, sizes[0], dtype=torch.float64)
    wanted = peer(x)
    assert torch.allclose(delta.around(base, x), wanted)
    delta.fold(base, 1)
    assert torch.allclose(base(x), wanted)
    assert torch.allclose(base.weight, peer.merge_and_unload().q.weight)


@pytest.mark.parametrize("residual", [True, False])
def test_krona_beside_a_feed_forward_part_is_its_closed_form(residual: bool) -> None:
    """Closed form: y + s (A x B) x + s_res x."""
    first, last = nn.Linear(12, 30).double(), nn.Linear(30, 12).double()
    tap = Tap(first, {})
    settings = {"scale": 2.0, "residual": residual}
    delta = filled(KroneckerBeside(last, settings, [tap]))
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    y = delta.around(last, tap.around(first, x))
    wanted = last(first(x)) + 2 * x @ delta.product.dense().T
    assert torch.allclose(y, wanted + delta.share * x if residual else wanted)


def test_krona_folds_into_the_fused_transposed_layers_of_gpt2() -> None:
    """Reference: the outputs before merging, in float64."""
    model = adapted(family("gpt2").double(), "krona")
    for delta in deltas_of(model, KroneckerDelta):
        filled(delta)
    before = model(IDS).logits
    merged = model.merge_and_unload()
    assert torch.allclose(merged(IDS).logits, before)
    assert not torch.allclose(merged(IDS).logits, family("gpt2").double()(IDS).logits)


# -- PHM


@pytest.mark.parametrize(("terms", "rank"), [(4, 1), (2, 3), (1, 1)])
def test_a_phm_layer_is_the_sum_of_its_kronecker_products(terms: int, rank: int) -> None:
    """Reference: x times sum over j of A_j x (s_j t_j), each built, in float64."""
    layer = filled(Hypercomplex(12, 20, terms, rank, False, CPU))
    rule = torch.randn(terms, terms, terms, dtype=torch.float64, requires_grad=True)
    weight = torch.zeros(20, 12, dtype=torch.float64)
    for j in range(terms):
        own = slice(j * rank, (j + 1) * rank)
        weight = weight + torch.kron(rule[j], layer.up[:, own] @ layer.down[own])
    assert torch.allclose(layer.dense(rule), weight)
    x = torch.randn(3, 2, 12, dtype=torch.float64, requires_grad=True)
    asked = [x, rule, *layer.parameters()]
    toward = torch.randn(3, 2, 20, dtype=torch.float64)
    found = torch.autograd.grad((layer(x, rule) * toward).sum(), asked)
    wanted = torch.autograd.grad((F.linear(x, weight, layer.bias) * toward).sum(), asked)
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_phm_adapter_is_its_closed_form() -> None:
    """Closed form: y + W_up gelu(W_down y + b_down) + b_up from the dense matrices."""
    base = nn.Linear(16, 16).double()
    settings = {"reduction": 2, "activation": "gelu", "terms": 4, "rank": 1}
    delta = filled(HypercomplexAdapter(base, settings))
    x = torch.randn(3, 16, dtype=torch.float64)
    y, rule = base(x), delta.rule.terms_JPQ
    hidden = F.gelu(F.linear(y, delta.down.dense(rule), delta.down.bias))
    wanted = y + F.linear(hidden, delta.up.dense(rule), delta.up.bias)
    assert torch.allclose(delta.around(base, x), wanted)


@pytest.mark.parametrize("method", ["compacter", "compacter_pp"])
def test_all_adapters_use_one_rule_that_the_first_of_them_holds(
    method: str, tmp_path: Path
) -> None:
    """Behaviour: also of a second adapter, after a copy and after loading."""
    from peft import PeftModel

    model = adapted(family("opt"), method)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family("opt"), tmp_path)
    lean = PeftModel.from_pretrained(family("opt"), tmp_path, low_cpu_mem_usage=True)
    for one, adapters in ((model, 2), (copy.deepcopy(model), 2), (loaded, 1), (lean, 1)):
        held = [n for n, _ in one.named_parameters() if n.endswith("rule.terms_JPQ")]
        assert len(held) == adapters
        assert all("layers.0." in name for name in held)
        used = {id(d._owner.rule.terms_JPQ) for d in deltas_of(one, HypercomplexAdapter)}
        assert used == {id(p) for n, p in one.named_parameters() if n in held}
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(name.endswith("rule.terms_JPQ") for name in file) == 1


# -- missing weights


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_a_sparse_layer_is_the_dense_one_with_zeros(score: str) -> None:
    """Reference: F.linear with the weights at their places, and autograd through it."""
    layer = filled(MaskedLinear(10, 6, 0.4, score, False, CPU))
    assert layer.values_K.numel() == 24
    places = layer.places_K.tolist()
    assert len(set(places)) == 24
    assert max(places) < 60
    weight = torch.zeros(60, dtype=torch.float64)
    for place, value in zip(places, layer.values_K.tolist(), strict=True):
        weight[place] = value
    weight = weight.view(6, 10).requires_grad_()
    assert torch.equal(layer.dense(), weight)
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    toward = torch.randn(2, 3, 6, dtype=torch.float64)
    assert torch.allclose(layer(x), F.linear(x, weight, layer.bias))
    found = torch.autograd.grad((layer(x) * toward).sum(), [x, layer.values_K])
    wanted = torch.autograd.grad((F.linear(x, weight) * toward).sum(), [x, weight])
    assert torch.allclose(found[0], wanted[0])
    assert torch.allclose(found[1], wanted[1].flatten()[places])
    assert torch.autograd.gradcheck(layer, (x,))


def test_magnitude_keeps_the_largest_of_the_draw_and_random_does_not() -> None:
    """Behaviour: of a uniform draw within 1 / sqrt(I), the largest quarter lies above 3 / 4."""
    torch.manual_seed(0)
    largest = MaskedLinear(64, 64, 0.25, "magnitude", False, CPU).values_K.abs()
    any_of = MaskedLinear(64, 64, 0.25, "random", False, CPU).values_K.abs()
    assert largest.min() > 0.7 / 8
    assert any_of.min() < 0.1 / 8
    assert not MaskedLinear(64, 64, 0.25, "magnitude", True, CPU).values_K.any()


def test_backward_keeps_the_values_and_no_matrix() -> None:
    """Closed form: of 64 x 64 weights a quarter, its places and the input."""
    layer = MaskedLinear(64, 64, 0.25, "random", False, CPU)
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    assert sorted(kept) == sorted([3 * 64, 64 * 64 // 4, 64 * 64 // 4])


def test_no_sparsity_is_the_adapter_that_has_all_weights() -> None:
    """Reference: the serial adapter with the same weights."""
    base = nn.Linear(12, 12).double()
    settings = {"reduction": 3, "activation": "swish", "sparsity": 0.0, "score": "random"}
    sparse, whole = filled(MaskedAdapter(base, settings)), SerialAdapter(base, settings).double()
    for mine, theirs in ((whole.adapter.down, sparse.down), (whole.adapter.up, sparse.up)):
        mine.weight.data.copy_(theirs.dense())
        mine.bias.data.copy_(theirs.bias)
    x = torch.randn(2, 12, dtype=torch.float64)
    assert torch.allclose(sparse.around(base, x), whole.around(base, x))


def test_what_is_missing_is_not_stored(tmp_path: Path) -> None:
    """Closed form: the file holds 4 bytes for each kept value and 4 for its place."""
    model = adapted(family("opt"), "sparse_adapter", sparsity=0.75)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    sites, kept = 2 * 3, 16 * 8 // 4
    assert sum(t.nbytes for t in file.values()) == sites * (2 * 8 * kept + 4 * (16 + 8))
    assert trained_count(model) == sites * (2 * kept + 16 + 8)


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
def test_a_sparse_adapter_may_stand_behind_the_feed_forward_part_alone(name: str) -> None:
    """Reference: of the places behind both parts those where `pfeiffer` stands, with as much in
    each; closed form: half of the count."""
    places: dict[str, dict[str, torch.Size]] = {}
    for key, method, fields in (("both", "sparse_adapter", {"sites": "both"}),
                                ("one", "sparse_adapter", {"sites": "feed_forward"}),
                                ("pfeiffer", "pfeiffer", {})):  # fmt: skip
        model = adapted(family(name), method, reduction=2, **fields)
        places[key] = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
        places[key + " at"] = {n.partition(".lowres_delta_parts")[0]: torch.Size()
                               for n in places[key]}  # fmt: skip
    assert places["one at"] == places["pfeiffer at"]
    assert places["one"].items() < places["both"].items()
    both, one = (sum(s.numel() for s in places[key].values()) for key in ("both", "one"))
    assert both == 2 * one > 0


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_sparse_layer_follows_autocast(kind: torch.dtype) -> None:
    """Reference: the dense layer under autocast; one rounding of the sum apart."""
    layer = MaskedLinear(16, 8, 0.5, "random", False, CPU)
    x = torch.randn(4, 16)
    with torch.autocast("cpu", dtype=kind):
        y, wanted = layer(x), F.linear(x, layer.dense(), layer.bias)
    assert y.dtype == wanted.dtype == kind
    assert torch.allclose(y.float(), wanted.float(), atol=0.02)
    y.float().sum().backward()
    assert layer.values_K.grad is not None
    assert layer.values_K.grad.dtype == torch.float32


# -- bottlenecks of all weights


def test_parallel_scales_by_a_constant_and_scaled_parallel_by_what_it_learns() -> None:
    """Closed form: y + s (W_up relu(W_down x + b_down) + b_up), and which s is trained."""
    first, last = nn.Linear(12, 30).double(), nn.Linear(30, 12).double()
    tap = Tap(first, {})
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    for learned in (True, False):
        settings = {"reduction": 3, "activation": "relu", "scale": 4.0, "learned": learned}
        delta = ParallelAdapter(last, settings, [tap]).double()
        down, up = delta.adapter.down, delta.adapter.up
        filled(delta.adapter)
        wanted = F.relu(x @ down.weight.T + down.bias) @ up.weight.T + up.bias
        y = delta.around(last, tap.around(first, x))
        assert torch.allclose(y, last(first(x)) + 4 * wanted)
        assert ("scale" in dict(delta.named_parameters())) == learned
    assert part_of("parallel").scale == 4
    assert not [n for n, _ in adapted(family("opt"), "parallel").named_parameters() if "scale" in n]


def test_pfeiffer_is_houlsby_without_the_adapters_behind_attention() -> None:
    """Reference: houlsby's modules. Between them they name every site once."""
    places = {
        method: {
            name.partition(".lowres_delta_parts")[0]
            for name, p in adapted(family("opt"), method).named_parameters()
            if p.requires_grad
        }
        for method in ("houlsby", "pfeiffer")
    }
    fewer = {name for name in places["houlsby"] if name.endswith("fc2")}
    assert places["pfeiffer"] == fewer
    assert len(places["houlsby"]) == 2 * len(fewer) == 6
    assert {n.rpartition(".")[2] for n in places["houlsby"] - fewer} == {"out_proj"}


# -- counts

D, M, LARGE = 1024, 1024 // 16, 48
COUNTS = {
    "houlsby": 2 * LARGE * (2 * D * M + M + D),
    "pfeiffer": LARGE * (2 * D * M + M + D),
    "scaled_parallel": LARGE * (2 * D * 512 + 512 + D + 1),
    "parallel": LARGE * (2 * D * 512 + 512 + D),
    "sparse_adapter": 2 * LARGE * (2 * round(0.6 * D * M) + M + D),
    "compacter": 2 * LARGE * (2 * (32 + D) + 32 + D) + 4**3,
    "compacter_pp": LARGE * (2 * (32 + D) + 32 + D) + 4**3,
    "krona": 2 * 72 * (32 * 32 + 32 * 8 + 8 * 32),
    "krona_block": LARGE * 2 * 32 * 32,
    "krona_res": LARGE * (2 * 32 * 32 + 1),
}


@pytest.fixture(scope="module")
def t5_large() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=D, d_ff=4096, d_kv=64, num_heads=16, num_layers=24, num_decoder_layers=24,
        vocab_size=32128,
    )  # fmt: skip
    with torch.device("meta"):
        return T5ForConditionalGeneration(config)


def test_the_counts_are_those_that_the_studies_give() -> None:
    """Reference: Scaling Down to Scale Up, for T5-Large."""
    assert round(COUNTS["houlsby"] / 1e6, 3) == 12.687
    assert round(COUNTS["pfeiffer"] / 1e6, 3) == 6.344
    assert round(COUNTS["scaled_parallel"] / 1e6, 3) == 50.405
    assert COUNTS["compacter"] == 304_192
    assert COUNTS["compacter_pp"] == 152_128
    assert COUNTS["krona"] == 221_184


@pytest.mark.parametrize("method", COUNTS)
def test_what_is_trained_in_t5_large_is_counted_by_a_formula(method: str, t5_large: Any) -> None:
    """Closed form of each method, on a model without values; what the deltas hold is taken as it
    would be trained, so that no copy of the model is needed."""
    part = part_of(method)
    config = DeltaConfig(method=method)
    config.place(part.pieces(t5_large, map_blocks(t5_large)), t5_large)
    before: list[Delta] = []
    for path, module in t5_large.named_modules():
        before += config.make(path, module, before).values()
    assert sum(p.numel() for delta in before for p in delta.parameters()) == COUNTS[method]


# -- the family on models


@pytest.mark.parametrize("method", WIDTHS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_it_serves_fused_and_gated_models(name: str, method: str) -> None:
    """Reference: the plain model at the start, bit for bit; then the loss falls."""
    model = adapted(family(name), method)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, family(name)(IDS).logits)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(12):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        assert all(p.grad is not None for p in trained)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", WIDTHS)
def test_blocks_that_run_twice_give_the_same_gradients(method: str) -> None:
    """Reference: without gradient checkpointing, bit for bit. Two inputs go through before the
    first goes back, and an input kept for a later layer must be the one of its own pass."""
    grads = []
    for again in (False, True):
        torch.manual_seed(0)
        model = adapted(family("opt"), method)
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.1)
        for layer in model.get_base_model().model.decoder.layers:
            if again:
                layer.forward = _recomputed(layer.forward)
        both = [model(ids[None], labels=ids[None]).loss for ids in IDS]
        trained = [p for p in model.parameters() if p.requires_grad]
        grads.append(torch.autograd.grad(torch.stack(both).sum(), trained))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(g.any() for g in grads[0])


def _recomputed(call: Callable[..., Any]) -> Callable[..., Any]:
    def inner(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(call, *args, use_reentrant=False, **kwargs)

    return inner


@pytest.mark.parametrize("method", WIDTHS)
@pytest.mark.parametrize("levers", [["nf4_weights"], ["nf4_weights", "gradient_checkpointing"]])
def test_it_trains_over_weights_in_4_bits(
    method: str, levers: list[str], recipe: Callable[..., Any]
) -> None:
    """Behaviour: every gradient is finite, and after two updates the output is another."""
    fields = {"name": method, **WIDTHS[method]}
    built = build(recipe(method=fields, levers=[{"name": lever} for lever in levers]))
    batch = built.collator(built.train_rows[:4])
    before = built.learner.logits(batch)
    for _ in range(2):
        loss: torch.Tensor = built.learner.logits(batch).float().square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        for name, parameter in built.model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        built.optimizer.step()
        built.optimizer.zero_grad()
    assert not torch.equal(built.learner.logits(batch), before)


@pytest.mark.parametrize("method", WIDTHS)
def test_a_base_in_bfloat16_keeps_its_type(method: str) -> None:
    """Behaviour: what is trained is float32, the model's outputs are not."""
    model = adapted(family("opt").bfloat16(), method)
    logits = model(IDS).logits
    assert logits.dtype == torch.bfloat16
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    grads = torch.autograd.grad(logits.float().sum(), trained, allow_unused=True)
    assert all(g is not None and g.isfinite().all() for g in grads)


# -- refusals


def test_terms_that_do_not_divide_the_width_are_refused_with_what_does() -> None:
    """Behaviour."""
    with pytest.raises(InputError, match="3 does not divide the 16 features.*use 2"):
        adapted(family("opt"), "compacter", terms=3)
