"""The methods that PEFT has: against PEFT's own configurations, and by their numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from lowres.bridges import peft as bridge
from lowres.bridges.blocks import map_blocks
from lowres.bridges.peft_tuner import entries_of
from lowres.core import registry
from lowres.core.errors import InputError
from lowres.making.build import build
from tests.conftest import sample_part

D, F, KV, LAYERS = 16, 24, 8, 2
LINEAR = {"q_proj": (D, D), "k_proj": (D, KV), "v_proj": (D, KV), "o_proj": (D, D),
          "gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}  # fmt: skip
"""Inputs and outputs of each linear layer of a block of `llama`."""
QV = {name: LINEAR[name] for name in ("q_proj", "v_proj")}
IDS = torch.arange(12).reshape(2, 6)


def llama(cls: Any = LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    return cls(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=D, n_layer=LAYERS, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config).eval()


def method(name: str, **fields: Any) -> Any:
    keys = sample_part("method", name) | fields
    return registry.load("method", keys.pop("name"))(**keys)


def adapt(model: nn.Module, one: Any, seed: int = 0) -> Any:
    blocks = map_blocks(model)
    torch.manual_seed(seed)
    return one.apply(model, blocks).eval()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.Adam(trained(model).values(), 1e-2)
    for _ in range(steps):
        scores: Any = model(IDS)
        nn.functional.cross_entropy(scores.logits.flatten(0, 1), IDS.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


COUNTS: dict[str, tuple[dict[str, tuple[int, int]], dict[str, Any], Callable[[int, int], int]]] = {
    "dora": (LINEAR, {"rank": 4}, lambda i, o: 4 * (i + o) + o),
    "rslora": (LINEAR, {"rank": 4}, lambda i, o: 4 * (i + o)),
    "lora_fa": (LINEAR, {"rank": 4}, lambda i, o: 4 * o),
    "vera": (QV, {"rank": 32}, lambda i, o: 32 + o),
    "adalora": (LINEAR, {"initial_rank": 6, "target_rank": 4}, lambda i, o: 6 * (i + o + 1)),
    "hira": (LINEAR, {"rank": 4}, lambda i, o: 4 * (i + o)),
    "shira": (LINEAR, {"rank": 3}, lambda i, o: 3 * (i + o)),
    "miss": (LINEAR, {"rank": 5}, lambda i, o: 5 * o),
    "road": (LINEAR, {"group_size": 4}, lambda i, o: o),
    "oft": (LINEAR, {"block_size": 8}, lambda i, o: i // 8 * (8 * 7 // 2)),
    "loha": (LINEAR, {"rank": 4}, lambda i, o: 2 * 4 * (i + o)),
    "fourierft": (QV, {"frequencies": 50}, lambda i, o: 50),
    "randlora": (QV, {"rank": 3}, lambda i, o: -(-min(i, o) // 3) * (3 + min(i, o))),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_trained_parameters_are_those_of_the_closed_form(name: str) -> None:
    """Closed form: a sum over the layers that the method goes to by default."""
    layers, fields, formula = COUNTS[name]
    counted = sum(p.numel() for p in trained(adapt(llama(), method(name, **fields))).values())
    assert counted == LAYERS * sum(formula(i, o) for i, o in layers.values())


EVERY = list(LINEAR)
HAND: dict[str, Callable[[], Any]] = {
    "rslora": lambda: peft.LoraConfig(
        r=64, lora_alpha=16, use_rslora=True, target_modules=EVERY),
    "vera": lambda: peft.VeraConfig(r=256, d_initial=0.1, target_modules=list(QV)),
    "hira": lambda: peft.HiraConfig(r=32, target_modules=EVERY),
    "miss": lambda: peft.MissConfig(r=4, target_modules=EVERY),
    "road": lambda: peft.RoadConfig(group_size=8, target_modules=EVERY),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=EVERY),
    "loha": lambda: peft.LoHaConfig(r=8, alpha=8, target_modules=EVERY),
    "fourierft": lambda: peft.FourierFTConfig(
        n_frequency=32, scaling=300.0, init_weights=True, target_modules=list(QV)),
    "randlora": lambda: peft.RandLoraConfig(r=32, randlora_alpha=640, target_modules=list(QV)),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND)
def test_it_is_what_peft_makes_of_the_configuration_written_by_hand(name: str) -> None:
    """Reference: PEFT without lowres, from the same seed. Equal bit for bit, before and after
    training: the same operations.
    """
    ours, theirs = adapt(llama(), method(name)), llama()
    torch.manual_seed(0)
    theirs = peft.get_peft_model(theirs, HAND[name]()).eval()
    assert trained(ours).keys() == trained(theirs).keys()
    for model in (ours, theirs):
        train(model)
    assert torch.equal(logits(ours), logits(theirs))
    assert not torch.equal(logits(ours), logits(llama()))


@pytest.mark.parametrize(("variant", "each"), [("road_2", 2), ("road_4", 4)])
def test_other_forms_of_road_are_peft_s(variant: Any, each: int) -> None:
    """Reference: PEFT without lowres, from the same seed, bit for bit, with angles and scales that
    differ within a pair; closed form: so many numbers for each output."""
    config = peft.RoadConfig(variant=variant, group_size=8, target_modules=EVERY)
    ours = adapt(llama(), method("road", variant=variant, group_size=8))
    theirs = peft.get_peft_model(llama(), config).eval()
    there = trained(theirs)
    assert trained(ours).keys() == there.keys()
    assert sum(p.numel() for p in there.values()) == LAYERS * each * sum(
        outputs for _, outputs in LINEAR.values()
    )
    for path, parameter in trained(ours).items():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
            there[path].copy_(parameter)
    for model in (ours, theirs):
        train(model)
    assert torch.equal(logits(ours), logits(theirs))
    assert not torch.allclose(logits(ours), logits(llama()), atol=1e-3)


def test_dora_is_what_peft_makes_of_the_configuration_written_by_hand() -> None:
    """Reference: PEFT without lowres, from the same seed, before and after training. Ours adds in
    another order, so both work in float64; tolerance: its rounding, over three updates of Adam.
    """
    config = peft.LoraConfig(r=16, lora_alpha=32, use_dora=True, target_modules=EVERY)
    ours, theirs = adapt(llama().double(), method("dora")), llama().double()
    torch.manual_seed(0)
    theirs = peft.get_peft_model(theirs, config).eval()
    assert trained(ours).keys() == trained(theirs).keys()
    for model in (ours, theirs):
        train(model)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-10, rtol=0)
    assert not torch.allclose(logits(ours), logits(llama().double()), atol=1e-3)


def test_shira_draws_and_trains_what_peft_does() -> None:
    """Reference: PEFT's SHiRA from the same seed, after the same updates; the sums in another
    order.
    """
    one = method("shira", mask_seed=7)
    ours, theirs = adapt(llama(), one), llama()
    config = peft.ShiraConfig(r=2, random_seed=7, target_modules=EVERY)
    theirs = peft.get_peft_model(theirs, config).eval()
    for model in (ours, theirs):
        train(model)
    assert not torch.allclose(logits(ours), logits(llama()), atol=1e-3)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-4)
    mine = entries_of(ours)
    for path, layer in theirs.get_base_model().named_modules():
        if hasattr(layer, "shira_indices"):
            rows, columns = layer.shira_indices["default"].long()
            assert torch.equal(mine[path].long(), rows * layer.in_features + columns), path


def test_ia3_scales_keys_values_and_the_input_of_the_last_layer() -> None:
    """Closed form: each vector multiplied into the weights by hand."""
    torch.manual_seed(1)
    adapted, plain = adapt(llama(), method("ia3")), llama()
    vectors = trained(adapted)
    assert len(vectors) == 3 * LAYERS
    for name, vector in vectors.items():
        nn.init.uniform_(vector, 0.5, 2.0)
        path = name.removeprefix("base_model.model.").partition(".ia3_l")[0]
        # Outputs are rows of a weight, inputs its columns.
        assert vector.shape == ((1, F) if path.endswith("down_proj") else (KV, 1))
        plain.get_submodule(path).weight.data.mul_(vector.data)
    torch.testing.assert_close(logits(adapted), logits(plain), atol=1e-6, rtol=1e-5)


def _large(d: int, f: int, layers: int) -> Any:
    config = T5Config(
        d_model=d, d_ff=f, d_kv=d // 16, num_heads=16, num_layers=layers, vocab_size=32
    )
    with torch.device("meta"):
        return T5ForConditionalGeneration(config)


@pytest.mark.parametrize(("name", "count"), [("ia3", 344_064), ("ln_tuning", 124_928)])
def test_t5_large_has_the_published_number_of_trained_parameters(name: str, count: int) -> None:
    """Reference: of (IA)3 L (2 d + f) in the encoder and L (4 d + f) in the decoder; of norms
    122 d.
    """
    model = _large(1024, 4096, 24)
    wrapped = method(name).apply(model, map_blocks(model))
    assert sum(p.numel() for p in trained(wrapped).values()) == count


def test_ln_tuning_with_a_new_head_leaves_a_plain_model_when_merged() -> None:
    """Reference: the names of the plain model; the head is the trained one."""
    model = llama(LlamaForSequenceClassification)
    plain = set(model.state_dict())
    one = method("ln_tuning")
    adapted: Any = one.apply(model, map_blocks(model, ["score.weight"], may_have_new_head=True))
    head = next(p for n, p in trained(adapted).items() if "score" in n)
    nn.init.constant_(head, 0.25)
    merged = one.merge(adapted)
    assert set(merged.state_dict()) == plain
    assert bool((merged.state_dict()["score.weight"] == 0.25).all())


def test_lora_fa_keeps_less_for_backward_than_lora() -> None:
    """Closed form: at least the inputs of all adapted layers, which the gradient of A wants."""
    kept = {}
    for name in ("lora", "lora_fa"):
        model = adapt(llama(), method(name, targets="q_proj+down_proj", rank=4))
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(IDS).logits.sum()
        kept[name] = sum(sizes.values())
    assert kept["lora"] - kept["lora_fa"] >= 4 * IDS.numel() * LAYERS * (D + F)


def test_lora_fa_is_lora_whose_first_matrix_rests() -> None:
    """Reference: lora with a learning rate of 0 for A."""
    ours = adapt(llama(), method("lora_fa", targets="all-linear"))
    theirs = adapt(llama(), method("lora", targets="all-linear"))
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    for model in (ours, theirs):
        train(model)
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("name", ["dora", "rslora", "lora_fa", "vera", "hira", "fourierft",
                                  "randlora", "ln_tuning", "ia3", "adalora", "shira", "miss",
                                  "road", "oft", "loha"])  # fmt: skip
def test_layers_with_transposed_weights_are_trained_and_merged(name: str) -> None:
    """Reference: unmerged logits of a GPT-2. Tolerance: float32 rounding of sums."""
    one = method(name)
    adapted = adapt(gpt2(), one)
    assert torch.equal(logits(adapted), logits(gpt2()))
    train(adapted)
    before = logits(adapted)
    assert not torch.allclose(before, logits(gpt2()), atol=1e-4)
    torch.testing.assert_close(logits(one.merge(adapted)), before, atol=1e-5, rtol=1e-5)


TURNED: dict[str, dict[str, Any]] = {"miss": {"rank": 5}, "road": {"variant": "road_4"}, "oft": {},
                                     "loha": {}}  # fmt: skip


@pytest.mark.parametrize("name", TURNED)
def test_beside_transposed_weights_it_is_what_peft_makes_beside_linear_layers(name: str) -> None:
    """Reference: the same from the same seed on the same GPT-2 with `nn.Linear` in the place of its
    Conv1D, where PEFT does all. Tolerance: float32 rounding of products that are cut otherwise.
    """
    ours, theirs = adapt(gpt2(), method(name, **TURNED[name])), gpt2()
    for path, layer in list(theirs.named_modules()):
        if type(layer).__name__ == "Conv1D":
            linear = nn.Linear(layer.nx, layer.nf)
            linear.load_state_dict({"weight": layer.weight.t(), "bias": layer.bias})
            theirs.set_submodule(path, linear)
    theirs = adapt(theirs, method(name, **TURNED[name]))
    for model in (ours, theirs):
        train(model)
    there = trained(theirs)
    assert trained(ours).keys() == there.keys() and len(there) >= 4 * LAYERS
    for path, parameter in trained(ours).items():
        torch.testing.assert_close(parameter, there[path], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(ours), logits(gpt2()), atol=1e-3)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TURNED)
def test_an_adapter_beside_transposed_weights_is_saved_merged_and_taken_out(
    name: str, tmp_path: Any
) -> None:
    """Reference: the adapter in memory, by PEFT's own loading; a second one beside it; the plain
    model, once merged weights are unmerged. Tolerance: float32 rounding of folded weights."""
    adapted = adapt(gpt2(), method(name, **TURNED[name]))
    train(adapted)
    before = logits(adapted)
    adapted.save_pretrained(tmp_path)
    loaded: Any = peft.PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    assert torch.equal(logits(loaded), before)
    loaded.add_adapter("second", copy.deepcopy(loaded.peft_config["default"]))
    loaded.set_adapter("second")
    torch.testing.assert_close(logits(loaded), logits(gpt2()), atol=1e-6, rtol=1e-5)
    loaded.set_adapter("default")
    loaded.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(loaded), before, atol=1e-5, rtol=1e-5)
    loaded.unmerge_adapter()
    torch.testing.assert_close(logits(loaded), before, atol=1e-5, rtol=1e-5)
    plain = gpt2().state_dict()
    for key, value in loaded.unload().state_dict().items():
        torch.testing.assert_close(value, plain[key], atol=1e-5, rtol=1e-5)
        assert value.is_contiguous(), key


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("shira", {"rank": 9}, "at most 8"),
        ("miss", {"rank": 17}, "its 16 inputs"),
        ("road", {"group_size": 64}, "set it to 16"),
        ("oft", {"block_size": 32}, "does not divide its 16 inputs"),
        ("fourierft", {"frequencies": 300}, "16 x 16"),
    ],
)
def test_fields_that_do_not_suit_a_layer_are_refused_by_path(
    name: str, fields: dict[str, Any], says: str
) -> None:
    """Behaviour: PEFT would round some of them without a word."""
    with pytest.raises(InputError, match=says) as refused:
        adapt(llama(), method(name, **fields))
    assert "layers.0" in str(refused.value)


def test_a_shard_that_does_not_divide_the_inputs_merges_too() -> None:
    """Reference: unmerged logits."""
    one = method("miss", rank=5)
    adapted = adapt(llama(), one)
    train(adapted)
    before = logits(adapted)
    torch.testing.assert_close(logits(one.merge(adapted)), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_dora_starts_as_the_base_over_16_bits(make: str) -> None:
    """Reference: norms of the rows in float32, and the base's logits, of which rounding of the
    norms alone would change an eighth."""
    base = {"llama": llama, "gpt2": gpt2}[make]().bfloat16()
    before = logits(base)
    adapted = adapt(copy.deepcopy(base), method("dora"))
    looked_at = 0
    for layer in adapted.modules():
        for vector in getattr(layer, "lora_magnitude_vector", {}).values():
            weight = layer.get_base_layer().weight.detach().float()
            norm = (weight.T if layer.fan_in_fan_out else weight).norm(dim=1)
            assert torch.allclose(vector.weight.flatten().float(), norm, rtol=1e-6)
            looked_at += 1
    assert looked_at
    assert torch.allclose(logits(adapted), before, rtol=0, atol=1e-5)


def test_dora_refuses_a_row_without_a_direction() -> None:
    """Behaviour: of zeros, whose first output would be 0 / 0."""
    base = llama()
    base.model.layers[1].self_attn.v_proj.weight.data[3] = 0
    with pytest.raises(InputError, match=r"row 3 of '.*1\.self_attn\.v_proj' is all zeros"):
        adapt(base, method("dora"))


def test_all_linear_says_that_it_does_not_reach_fused_experts() -> None:
    """Behaviour: with the layers that can be named; adapters name the mixture of experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    blocks = map_blocks(model)
    with pytest.raises(InputError, match=r"experts.*name the layers.*k_proj.*q_proj"):
        method("rslora", rank=2).apply(copy.deepcopy(model), blocks)
    method("rslora", rank=2, targets="q_proj+v_proj").apply(copy.deepcopy(model), blocks)
    with pytest.raises(InputError, match="is a mixture of experts"):
        method("houlsby").apply(model, blocks)


def test_targets_that_peft_knows_by_a_pattern_are_matched(monkeypatch: Any) -> None:
    """Behaviour: its table has one expression in place of names for some models."""
    from peft.utils import constants

    table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    monkeypatch.setitem(table, "llama", r".*self_attn\.(q|v)_proj")
    model = llama()
    paths = bridge.linear_targets(model, map_blocks(model), "paper")
    assert paths and all(path.endswith(("q_proj", "v_proj")) for path in paths)


def test_dora_starts_at_the_norms_of_the_rows() -> None:
    """Closed form: m = ||W|| over the inputs."""
    adapted, looked_at = adapt(llama(), method("dora")), 0
    for layer in adapted.get_base_model().modules():
        if hasattr(layer, "lora_magnitude_vector"):
            magnitude = layer.lora_magnitude_vector["default"].weight
            rows = layer.get_base_layer().weight.norm(dim=1)
            torch.testing.assert_close(magnitude.detach(), rows, atol=0, rtol=1e-6)
            looked_at += 1
    assert looked_at == 2 * len(LINEAR)


def test_what_is_shared_and_random_is_saved_with_the_adapter(tmp_path: Any) -> None:
    """Behaviour: another seed at loading changes nothing."""
    for name in ("vera", "randlora"):
        adapted = adapt(llama(), method(name))
        train(adapted)
        adapted.save_pretrained(tmp_path / name)
        torch.manual_seed(77)
        model = peft.PeftModel.from_pretrained(llama(), tmp_path / name, low_cpu_mem_usage=True)
        assert torch.equal(logits(model.eval()), logits(adapted)), name


NARROW = ["dora", "rslora", "lora_fa", "vera", "adalora", "hira", "shira", "miss", "road", "oft",
          "loha", "fourierft", "randlora", "ln_tuning", "ia3", "boft", "pissa"]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "precision"),
    # PEFT gives float32 on to the next layer in some, which only autocast would take.
    [(n, "bf16") for n in NARROW]
    + [(n, "no") for n in ("ia3", "road", "randlora", "adalora", "shira")],
)
@pytest.mark.parametrize("lever", ["nf4_weights", "int8_weights"])
def test_it_trains_around_weights_in_few_bits(
    name: str, lever: str, precision: str, raw_recipe: Callable[..., dict[str, Any]]
) -> None:
    """Behaviour: around a model in bfloat16, under autocast and without."""
    from lowres.core.reading import load_recipe

    keys = raw_recipe(
        "decoder", model={"dtype": "bfloat16"}, method=sample_part("method", name),
        objective="label_words", levers=[lever], loop={"precision": precision},
    )  # fmt: skip
    recipe = load_recipe(keys)
    built = build(recipe)
    batch = built.collator(built.train_rows[:4])
    losses = []
    for group in built.optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = recipe.objective.loss(built.learner, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(torch.isfinite(p.grad).all() for p in trained(built.model).values())  # type: ignore[arg-type]
        built.optimizer.step()
        built.optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_merging_does_not_touch_a_second_copy() -> None:
    """Reference: the unmerged copy, switched off; its base still answers as the plain model."""
    adapted = adapt(llama(), method("oft"))
    train(adapted)
    other = copy.deepcopy(adapted)
    method("oft").merge(adapted)
    with bridge.disabled(other):
        assert torch.equal(logits(other), logits(llama()))
