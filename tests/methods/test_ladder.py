"""A ladder beside the model: its formula, what is kept for backward, generating, pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lowres.bridges import pruned, side_blocks
from lowres.bridges.blocks import checkpoint_blocks, map_blocks
from lowres.bridges.peft import preload, unwrap_adapted
from lowres.core import registry
from lowres.core.errors import InputError, LowresError
from lowres.making.build import build

WORDS = 61
D, F = 32, 48


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(**{
            "vocab_size": WORDS, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 3,
            "num_attention_heads": 8, "num_key_value_heads": 4,
        } | changes)
    )  # fmt: skip


def mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(
            vocab_size=WORDS, hidden_size=D, intermediate_size=F, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=4,
        )
    )  # fmt: skip


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_embd=D, n_layer=3, n_head=4, n_positions=64,
                   resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    )  # fmt: skip


def gpt_neo() -> Any:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    return GPTNeoForCausalLM(
        GPTNeoConfig(vocab_size=WORDS, hidden_size=D, intermediate_size=F, num_layers=2,
                     attention_types=[[["global", "local"], 1]], num_heads=4, window_size=4,
                     max_position_embeddings=64, resid_dropout=0, embed_dropout=0)
    )  # fmt: skip


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=WORDS, d_model=D, d_kv=8, d_ff=F, num_layers=3, num_heads=4,
                 dropout_rate=0, decoder_start_token_id=0)
    )  # fmt: skip


def bart() -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(
        BartConfig(vocab_size=WORDS, d_model=D, encoder_layers=2, decoder_layers=2,
                   encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=F,
                   decoder_ffn_dim=F, max_position_embeddings=64, dropout=0, pad_token_id=0,
                   bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)
    )  # fmt: skip


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(vocab_size=WORDS, hidden_size=D, intermediate_size=F, num_hidden_layers=3,
                   num_attention_heads=4, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    )  # fmt: skip


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama, "mistral": mistral, "gpt2": gpt2, "t5": t5, "bert": bert
}  # fmt: skip


# GPT-Neo numbers its attentions by another name.
GENERATING = {n: m for n, m in MODELS.items() if n != "bert"} | {"gpt_neo": gpt_neo}


@pytest.fixture(params=MODELS)
def made(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def adapted(model: Any, frozen: int = 0, **fields: Any) -> Any:
    method = registry.load("method", "ladder")(**{"reduction": 2} | fields)
    blocks = map_blocks(model)
    return method.apply(model, blocks.only(blocks.names[frozen:], train_stem=False))


def moved(model: Any) -> Any:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    return model


def rungs(model: Any) -> Iterator[Any]:
    return (m for m in model.modules() if type(m).__name__ == "Rung")


def batch(model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(5, WORDS, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # padded on the left
    out = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        out["decoder_input_ids"] = torch.randint(5, WORDS, (3, 5))
    return out


def answer(model: Any, **others: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**batch(model), **others).logits
    return logits


def kept(model: Any) -> list[torch.Tensor]:
    """What autograd keeps of a forward pass, beside parameters; every memory counts once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        at = tensor.untyped_storage().data_ptr()
        if at not in own:
            found.setdefault(at, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**batch(model))
    return list(found.values())


def size(tensors: list[torch.Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def test_the_start_is_the_model_and_the_end_is_not(made: Any) -> None:
    """Reference: the plain model; equal bit for bit. Hidden states are still the model's own: their
    kernels may be others where nothing is kept for backward.
    """
    plain = answer(made)
    model = adapted(made)
    assert torch.equal(answer(model), plain)
    assert not torch.allclose(answer(moved(model)), plain)
    after = model(**batch(made), output_hidden_states=True)
    with model.disable_adapter():
        before = made(**batch(made), output_hidden_states=True)
    for key in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
        if getattr(before, key, None) is not None:
            assert len(getattr(after, key)) == len(getattr(before, key))
            mine, theirs = (getattr(one, key)[1] for one in (after, before))
            assert torch.allclose(mine, theirs, atol=1e-5)


def test_the_formula() -> None:
    """Closed form: h_l = B_l(g h_{l-1} + (1 - g) D_l H_l), g = sigmoid(a / t), in float64."""
    torch.manual_seed(0)
    model = bert().double().eval()
    ids = batch(model)["input_ids"]
    states = model.bert(ids, output_hidden_states=True).hidden_states
    ladder = moved(adapted(model, gate_temperature=0.5)).double()
    hidden = states[0] @ next(rungs(ladder)).first.weight.T
    for rung, state in zip(rungs(ladder), states[1:], strict=True):
        gate = 1 / (1 + torch.exp(-rung.gate / 0.5))
        hidden = rung.block(gate * hidden + (1 - gate) * (state @ rung.down.weight.T))
        last = state + hidden @ rung.up.weight.T if rung.up is not None else state
    pooled = model.bert.pooler(last)
    assert torch.allclose(ladder(ids).logits, model.classifier(pooled), atol=1e-10)


@pytest.mark.parametrize("recomputed", [False, True])
def test_nothing_of_the_model_is_kept_for_backward(made: Any, recomputed: bool) -> None:
    """Behaviour: nothing that is computed in a block asks for a gradient, nor in blocks that are
    recomputed, where T5 asks for one of its biases.
    """
    seen: list[Any] = []
    for name in map_blocks(made).names:
        for module in made.get_submodule(name).modules():
            module.register_forward_hook(lambda m, a, out: seen.append(out))
    model = adapted(made).train()
    if recomputed:
        checkpoint_blocks(made)
    model(**batch(made))
    tensors = [t for out in seen for t in (out if isinstance(out, tuple) else (out,))]
    assert len(tensors) > 3
    assert not any(isinstance(t, torch.Tensor) and t.grad_fn is not None for t in tensors)
    model(**batch(made)).logits.float().pow(2).mean().backward()
    assert all(p.grad is None for p in made.parameters() if not p.requires_grad)


def test_less_is_kept_than_of_lora() -> None:
    """Reference: LoRA at the queries and values, of the same model; and feed-forward units of the
    model cost nothing more.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    everything = map_blocks(llama(**sizes))
    lora = registry.load("method", "lora")().apply(llama(**sizes), everything)
    ladder = adapted(llama(**sizes), reduction=8)
    assert size(kept(ladder)) < 0.5 * size(kept(lora))
    # Of the model's width are H_l, what the first block is given, and what the last norm keeps.
    states = [t for t in kept(ladder) if t.untyped_storage().nbytes() == 3 * 9 * 64 * 4]
    assert len(states) == 4 + 1 + 1
    wider = adapted(llama(**sizes | {"intermediate_size": 256 * 8}), reduction=8)
    small = size(kept(adapted(llama(**sizes), reduction=8)))
    units = 4 * (256 * 8 - 256) // 8 * 3 * 9 * 4  # blocks, side units, tokens, bytes
    assert size(kept(wider)) - small <= 4 * units


def test_beside_a_model_in_bfloat16_half_is_kept() -> None:
    """Behaviour: trained parameters stay in float32."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    wide, narrow = (adapted(llama(**sizes).to(t)) for t in (torch.float32, torch.bfloat16))
    assert {p.dtype for r in rungs(narrow) for p in r.parameters()} == {torch.float32}
    assert next(rungs(narrow))._climb.hidden is None
    # Copies of the small blocks' weights in 16 bits, and what norms widen, are above the half.
    weights = sum(2 * p.numel() for r in rungs(narrow) for p in r.parameters())
    assert size(kept(narrow)) - weights < 0.7 * size(kept(wide))
    moved(narrow)(**batch(narrow)).logits.float().mean().backward()
    assert all(torch.isfinite(p.grad).all() for r in rungs(narrow) for p in r.parameters())


def test_parameters_are_counted_by_a_formula(made: Any) -> None:
    """Closed form: blocks of width w, (L + 1) d w a stack, d w up, and a gate each."""
    names = map_blocks(made).names
    stacks = len({n.rpartition(".")[0] for n in names})
    w = D // 2
    ladder = adapted(made)
    total = sum(p.numel() for r in rungs(ladder) for p in r.parameters())
    blocks = sum(p.numel() for r in rungs(ladder) for p in r.block.parameters())
    assert total - blocks == (len(names) + stacks + 1) * D * w + len(names)
    if made.config.model_type == "llama":
        heads, groups, each = 4, 2, D // 8
        attention = 2 * w * heads * each + 2 * w * groups * each
        assert blocks == 3 * (attention + 3 * w * F // 2 + 2 * w)


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("beams", [1, 3])
def test_generating_with_a_cache_equals_generating_without(name: str, beams: int) -> None:
    """Reference: the forward pass over the whole text at every step; rows are padded on the left,
    and beams change their places.
    """
    torch.manual_seed(0)
    model = moved(adapted(GENERATING[name]().eval())).eval()
    given = batch(model)
    given.pop("decoder_input_ids", None)
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams}
    told = {"return_dict_in_generate": True, "output_logits": True}
    made = [model.generate(**given, **how, **told, use_cache=cache) for cache in (True, False)]
    assert torch.equal(made[0].sequences, made[1].sequences)
    logits = [torch.stack(one.logits) for one in made]
    assert torch.allclose(*logits, atol=1e-4)
    with model.disable_adapter():
        plain = torch.stack(model.generate(**given, **how, **told).logits)
    assert not torch.allclose(plain, logits[0], atol=1e-2)


def test_a_cache_made_as_it_is_reached_and_cropped() -> None:
    """Reference: the forward pass over the whole text."""
    from transformers import DynamicCache

    torch.manual_seed(0)
    model = moved(adapted(llama().eval())).eval()
    ids = batch(model)["input_ids"]
    cache = DynamicCache()
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        steps = [
            model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
            for t in range(ids.shape[1])
        ]
        assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)
        cache.crop(-3)
        again = model(input_ids=ids[:, -3:], past_key_values=cache, use_cache=True).logits
    assert torch.allclose(again, whole[:, -3:], atol=1e-5)


def test_a_kind_of_cache_that_is_not_known_is_told() -> None:
    """Behaviour."""
    model = adapted(mistral().eval())
    ids = batch(model)["input_ids"]
    with pytest.raises(LowresError, match="StaticSlidingWindowLayer has no place"):
        model.generate(input_ids=ids, max_new_tokens=3, cache_implementation="static")


def test_a_cache_for_a_block_without_a_number_is_told() -> None:
    """Behaviour: where its keys and values lie is not known, so neither where a place is free."""
    from transformers import DynamicCache

    room = side_blocks.Room(None, 2)
    room.take(torch.nn.Linear(2, 2), {"past_key_values": None})
    with pytest.raises(LowresError, match="a Linear has no number.*use_cache=False"):
        room.take(torch.nn.Linear(2, 2), {"past_key_values": DynamicCache()})


def test_an_encoders_output_of_another_pass_is_refused() -> None:
    """Behaviour: the side network's part of it is not in it."""
    model = adapted(t5().eval())
    given = batch(model)
    encoded = unwrap_adapted(model).get_encoder()(given["input_ids"])
    model(**given)
    with pytest.raises(LowresError, match="call the model as a whole"):
        model(encoder_outputs=encoded, decoder_input_ids=given["decoder_input_ids"])


@pytest.mark.parametrize("disabled", [False, True])
def test_an_encoders_output_of_the_same_size_is_told_from_the_last_one(disabled: bool) -> None:
    """Reference: the model called as a whole on the second text; the first text's, and one that was
    made without the ladder, are refused."""
    model = moved(adapted(t5().eval())).eval()
    given = batch(model)
    decoded = {"decoder_input_ids": given["decoder_input_ids"]}
    encode = unwrap_adapted(model).get_encoder()
    with torch.no_grad():
        first = encode(given["input_ids"])
        if disabled:
            with model.disable_adapter():
                other = encode(given["input_ids"].flip(1))
            with pytest.raises(LowresError, match="call the model as a whole"):
                model(encoder_outputs=other, **decoded)
            return
        second = encode(given["input_ids"].flip(1))
        with pytest.raises(LowresError, match="call the model as a whole"):
            model(encoder_outputs=first, **decoded)
        found = model(encoder_outputs=second, **decoded).logits
        assert torch.equal(found, model(input_ids=given["input_ids"].flip(1), **decoded).logits)


def test_of_the_full_width_pruning_keeps_everything(made: Any) -> None:
    """Closed form: a small block that is as wide as the model's is the model's."""
    names = map_blocks(made).names
    places = {n for n in names if n.endswith(".0")}
    for block in map(made.get_submodule, places):
        small = side_blocks.make(block, 1, True)
        own = dict(block.named_parameters())
        for name, parameter in small.named_parameters():
            assert torch.equal(parameter, own[name]), name


def test_pruning_keeps_the_largest() -> None:
    """Closed form: features, heads and units whose weights are made small are left out."""
    torch.manual_seed(0)
    block = llama(num_key_value_heads=8).model.layers[1]
    keep = {"d": torch.arange(1, D, 2), "a": torch.arange(D // 2, D), "f": torch.arange(0, F, 2)}
    gone = {key: torch.tensor(sorted(set(range(n)) - set(keep[key].tolist())))
            for key, n in (("d", D), ("a", D), ("f", F))}  # fmt: skip
    with torch.no_grad():
        for up in (block.mlp.gate_proj, block.mlp.up_proj):
            up.weight[gone["f"]] *= 1e-3
            up.weight[:, gone["d"]] *= 1e-3
        block.mlp.down_proj.weight[:, gone["f"]] *= 1e-3
        block.self_attn.o_proj.weight[:, gone["a"]] *= 1e-3
    small = side_blocks.make(block, 2, False)
    pairs = [
        (small.mlp.up_proj, block.mlp.up_proj, "f", "d"),
        (small.mlp.down_proj, block.mlp.down_proj, "d", "f"),
        (small.self_attn.k_proj, block.self_attn.k_proj, "a", "d"),
        (small.self_attn.o_proj, block.self_attn.o_proj, "d", "a"),
    ]
    for mine, theirs, rows, columns in pairs:
        assert torch.equal(mine.weight, theirs.weight[keep[rows]][:, keep[columns]])


@pytest.mark.parametrize("frozen", [1, 3, 4])
@pytest.mark.parametrize("every", [1, 2])
def test_a_ladder_begins_where_training_is_allowed(frozen: int, every: int) -> None:
    """Behaviour: of three encoder and three decoder blocks; every rung has a gradient."""
    torch.manual_seed(0)
    model = moved(adapted(t5(), frozen=frozen, every=every))
    stacks = (max(0, 3 - frozen), min(3, 6 - frozen))
    assert len(list(rungs(model))) == sum(-(-blocks // every) for blocks in stacks)
    model(**batch(model)).logits.pow(2).mean().backward()
    grads = [p.grad for r in rungs(model) for p in r.parameters()]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_blocks_that_are_left_out_leave_their_rungs_out() -> None:
    """Behaviour: layer drop."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(vocab_size=WORDS, hidden_size=D, word_embed_proj_dim=D, ffn_dim=F,
                       num_hidden_layers=4, num_attention_heads=4, layerdrop=0.5)  # fmt: skip
    model = moved(adapted(OPTForCausalLM(config))).train()
    for seed in range(6):
        torch.manual_seed(seed)
        assert torch.isfinite(model(**batch(model)).logits).all()


def test_recomputed_blocks_give_the_same_gradients(made: Any) -> None:
    """Reference: gradients without checkpointing. Kernels of T5 are others: its biases, too, are
    then asked for a gradient.
    """
    model = moved(adapted(made)).train()
    results = []
    for again in (False, True):
        if again:
            checkpoint_blocks(made)
        model.zero_grad()
        model(**batch(made)).logits.float().pow(2).mean().backward()
        results.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.allclose(plain, recomputed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [bart, t5, llama])
def test_blocks_that_are_recomputed_the_re_entrant_way_give_the_same_gradients(make: Any) -> None:
    """Reference: gradients without checkpointing. The encoder's side and T5's biases are used by
    several blocks."""
    torch.manual_seed(0)
    model = moved(adapted(make())).train()
    results = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**batch(model)).logits.float().pow(2).mean().backward()
        results.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.allclose(plain, recomputed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("meta", [False, True])
def test_plain_peft_loads_it(made: Any, meta: bool, tmp_path: Path) -> None:
    """Reference: the model in memory, equal bit for bit."""
    from peft import PeftModel

    if made.config.model_type == "bert":
        pytest.skip("has a head beside the adapter; the contract of methods loads it")
    state = {k: v.clone() for k, v in made.state_dict().items()}
    model = moved(adapted(made))
    model.save_pretrained(tmp_path)
    fresh = type(made)(made.config).eval()
    fresh.load_state_dict(state)
    preload()
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=meta).eval()
    assert torch.equal(answer(loaded), answer(model.eval()))


@pytest.mark.parametrize("lever", ["nf4_weights", "int8_weights"])
def test_over_weights_in_few_bits(lever: str, recipe: Callable[..., Any]) -> None:
    """Closed form: the small block is pruned from what the packed weights stand for."""
    built = build(recipe("decoder", method="ladder", levers=[{"name": lever}]))
    rung = next(rungs(built.model))
    block: Any = unwrap_adapted(built.model).model.decoder.layers[0].get_base_layer()
    dense = pruned.dense(block.fc1)
    assert dense.shape == (32, 16)
    values = set(dense.flatten().tolist())
    assert {*rung.block.fc1.weight.flatten().tolist()} <= values
    out = built.model(input_ids=torch.randint(5, 60, (2, 5))).logits
    out.float().pow(2).mean().backward()
    assert rung.down.weight.grad is not None


def test_what_cannot_be_made_narrower_is_refused() -> None:
    """Behaviour."""
    from transformers import FalconConfig, FalconForCausalLM

    falcon = FalconForCausalLM(
        FalconConfig(vocab_size=WORDS, hidden_size=D, num_hidden_layers=2, num_attention_heads=4)
    )
    with pytest.raises(InputError, match="alibi"):
        adapted(falcon)


def test_a_plan_tells_what_is_measured(recipe: Callable[..., Any], in_folder: Path) -> None:
    """Reference: a real run on the CPU, to the byte."""
    import lowres

    record = lowres.run(recipe("encoder_decoder", method="ladder"), quiet=True)
    assert record.plan is not None and record.measured.phases is not None
    for phase in ("first_step", "steady_steps", "evaluate"):
        planned = record.plan["phases"][phase]["live_bytes"]
        assert planned == record.measured.phases[phase].live_bytes, phase
