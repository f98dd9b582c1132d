"""Keys and values in front of those of an attention: the mathematics, masks, caches, counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowres.bridges import attention, peft_tuner
from lowres.bridges.blocks import checkpoint_blocks, map_blocks
from lowres.core import registry
from lowres.core.errors import InputError, LowresError
from lowres.making.build import build
from lowres.making.gradients import micro_batches
from lowres.methods._prefix import KeyValuePrefix, flatten
from tests.conftest import KINDS, tiny_config
from tests.methods.adapted import all_move, far_gradients

PREFIXED = ("prefix_tuning", "mam", "unipelt")
# One unit of the bottleneck alone may be off for all tokens.
WIDE: dict[str, dict[str, Any]] = {"unipelt": {"reduction": 2}}
B, T, P, D = 2, 5, 3, 16


def config_of(family: str) -> Any:
    from transformers import GPT2Config, LlamaConfig

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        return GPT2Config(vocab_size=64, n_embd=D, n_layer=2, n_head=2, n_positions=64,
                          resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0, **ids)  # fmt: skip
    if family == "llama":
        return LlamaConfig(
            vocab_size=64, hidden_size=D, intermediate_size=32, num_hidden_layers=2, head_dim=8,
            num_attention_heads=4, num_key_value_heads=2, **ids,
        )  # fmt: skip
    config = tiny_config(family)
    config.vocab_size = 64
    if family == "encoder_decoder":
        # The inner width is not that of the model.
        config.num_heads, config.d_kv = 3, 8
    return config


def plain(family: str, config: Any = None) -> Any:
    """A model far from zero, in float64."""
    from transformers import AutoModelForCausalLM, BertForMaskedLM, T5ForConditionalGeneration

    torch.manual_seed(0)
    makers = {"encoder": BertForMaskedLM, "encoder_decoder": T5ForConditionalGeneration}
    config = config or config_of(family)
    maker = makers.get(family)
    model: Any = maker(config) if maker else AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    return model.double().eval().requires_grad_(False)


def adapted(family: str, method: str, **fields: Any) -> Any:
    model = plain(family)
    part = registry.load("method", method)(**fields)
    return part.apply(model, map_blocks(model)).double().eval()


def rows(family: str, length: int = T) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (B, length), generator=generator)
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "encoder_decoder":
        out["decoder_input_ids"] = ids.flip(1)
    return out


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs).logits
    return out


class Asker(nn.Module):
    """An attention with one adapted layer, as the function that is wrapped sees it."""

    def __init__(self, heads: int, groups: int, is_causal: bool, kind: type, **settings: Any):
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, is_causal
        self.proj = peft_tuner.DeltaLayer(nn.Linear(D, D))
        settings = {"length": P, "mlp": 4, "group": "all", "heads": heads // groups, "width": 8,
                    **settings}  # fmt: skip
        self.delta = kind(self.proj.base_layer, settings)
        self.proj.add("default", {"prefix": self.delta}, False)
        self.double()


def softmax_over_all(
    query: torch.Tensor, keys: Any, values: Any, visible: torch.Tensor, bias: Any, gate: Any
) -> torch.Tensor:
    """`softmax(q [g P_K; K]^T + bias) [g P_V; V]` query by query, (B, T, H, E)."""
    out = torch.zeros_like(query)
    groups = query.shape[1] // keys[1].shape[1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for t in range(query.shape[2]):
                g = 1.0 if gate is None else gate[b, t]
                k = torch.cat([g * keys[0][b, h // groups], keys[1][b, h // groups]])
                v = torch.cat([g * values[0][b, h // groups], values[1][b, h // groups]])
                scores = k @ query[b, h, t] / math.sqrt(query.shape[-1])
                scores[P:] += bias[0, h, t] if bias is not None else 0
                scores[P:][~visible[b, 0, t]] = -torch.inf
                out[b, h, t] = torch.softmax(scores, 0) @ v
    return out.transpose(1, 2)


MASKS = ("none", "causal flag", "left padding", "additive", "bias", "bias and flag", "one query",
         "room in the cache")  # fmt: skip


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("case", MASKS)
def test_an_attention_is_a_softmax_over_prefix_and_keys(
    case: str, groups: int, gated: bool
) -> None:
    """Closed form: the sum written out in float64, for each way in which models say what a query
    sees, and the same as a mean of the model's own attention and one over the prefix."""
    from transformers import AttentionInterface

    from lowres.methods._token_gates import GatedPrefix

    torch.manual_seed(0)
    flag = case in ("causal flag", "bias and flag", "room in the cache")
    asker = Asker(4, groups, flag, GatedPrefix if gated else KeyValuePrefix)
    queries = 1 if case == "one query" else T
    query = torch.randn(B, 4, queries, 8).double()
    key, value = torch.randn(2, B, 4 // groups, T, 8).double()
    mask, bias = None, None
    visible = torch.ones(B, 1, queries, T, dtype=torch.bool)
    if flag:
        visible = visible.tril()
    if case == "left padding":
        visible = visible.tril()
        visible[0, :, :, :2] = False
        mask = visible
    if case == "additive":
        visible[1, :, :, 3:] = False
        mask = torch.zeros(visible.shape).double().masked_fill(~visible, -torch.inf)
    if "bias" in case:
        bias = torch.randn(1, 4, queries, T).double()
    gate = None
    if gated:
        hidden = torch.randn(B, queries, D).double()
        asker.proj(hidden)
        gate = asker.delta.gate(hidden)[..., 0].detach()
    made = asker.delta.keys_values(B).detach()
    given = [key, value]
    if case == "room in the cache":
        given = [torch.cat([t, torch.full_like(t, 9.0)], 2) for t in given]
    call = AttentionInterface()["sdpa"]
    with torch.no_grad():
        out, _ = call(asker, query, *given, mask, scaling=8**-0.5, position_bias=bias)
    wanted = softmax_over_all(query, (made[0], key), (made[1], value), visible, bias, gate)
    assert torch.allclose(out, wanted, atol=1e-12)
    if gated or groups > 1 or case == "left padding":
        return
    # The other form, with what the function gives without a prefix.
    asker.proj.enable_adapters(False)
    with torch.no_grad():
        own = call(asker, query, *given, mask, scaling=8**-0.5, position_bias=bias)[0]
    to_prefix = query @ made[0].transpose(-1, -2) / 8**0.5
    to_own = query @ key.transpose(-1, -2) / 8**0.5 + (0 if bias is None else bias)
    to_own = to_own.masked_fill(~visible, -torch.inf)
    share = torch.cat([to_prefix, to_own], -1).softmax(-1)[..., :P].sum(-1, keepdim=True)
    added = share * (to_prefix.softmax(-1) @ made[1])
    both = (1 - share).transpose(1, 2) * own + added.transpose(1, 2)
    assert torch.allclose(out, both, atol=1e-12)


def test_without_a_prefix_the_original_is_called_as_it_was() -> None:
    """Behaviour: the wrapper hands everything on, object by object, and is put there once."""
    from transformers import AttentionInterface

    attention.watch()
    there = AttentionInterface()["sdpa"]
    attention.watch()
    assert AttentionInterface()["sdpa"] is there
    seen: list[Any] = []
    wrapped = attention._asking(lambda *args, **others: seen.append((args, others)))
    given = [nn.Module(), *torch.zeros(3, 1), None]
    wrapped(*given, dropout=0.0, other=given)
    (((*args,), others),) = seen
    assert all(a is b for a, b in zip(args, given, strict=True))
    assert others == {"dropout": 0.0, "other": given}


@pytest.mark.parametrize("mlp", [None, 7])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_is_peft_s_prefix_tuning(family: str, mlp: int | None) -> None:
    """Reference: PEFT's own with the same tables or the same network, by logits and gradients. In
    PEFT a prefix takes positions, which are given to ours by hand. Tolerance: rounding in float64.
    """
    import peft

    config = config_of(family)
    if family == "llama":  # PEFT takes widths of heads and of a network from the model's.
        config.head_dim = D // config.num_attention_heads
        config.num_key_value_heads = 2 if mlp is None else config.num_attention_heads
    model = plain(family, config)
    part: Any = registry.load("method", "prefix_tuning")(length=P, mlp=mlp)
    ours = part.apply(model, map_blocks(model)).double().eval()
    asked = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=mlp is not None,
        encoder_hidden_size=mlp,
    )  # fmt: skip
    theirs = peft.get_peft_model(plain(family, config), asked).double().eval()
    own = [m for m in ours.modules() if isinstance(m, KeyValuePrefix)]
    encoder: Any = theirs.prompt_encoder["default"]

    def pairs(of: Callable[[nn.Parameter], torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """What is the same of both: blocks lie side by side in PEFT's."""
        if mlp is None:
            return [(torch.cat([of(m.table) for m in own], 1), of(encoder.embedding.weight))]
        first, _, last = encoder.transform
        return [
            (of(own[0].vectors), of(encoder.embedding.weight)),
            (of(own[0].down.weight), of(first.weight)), (of(own[0].down.bias), of(first.bias)),
            (torch.cat([of(m.up.weight) for m in own]), of(last.weight)),
            (torch.cat([of(m.up.bias) for m in own]), of(last.bias)),
        ]  # fmt: skip

    for mine, other in pairs(lambda p: p.data):
        other.copy_(mine)
    places = {"position_ids": torch.arange(P, P + T).expand(B, T)}
    inputs = rows(family)
    found = []
    for one, more in ((ours, places), (theirs, {})):
        scores = one(**inputs, **more).logits
        nn.functional.cross_entropy(scores.flatten(0, 1), inputs["input_ids"].flatten()).backward()
        found.append(scores.detach())
    torch.testing.assert_close(*found, atol=1e-10, rtol=0)
    assert not torch.allclose(found[0], logits(plain(family, config), **inputs), atol=1e-3)
    for mine, other in pairs(lambda p: p.grad):  # type: ignore[return-value, arg-type]
        assert mine.any()
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prefix_is_what_a_filled_cache_is(family: str) -> None:
    """Reference: the plain model, given the keys and values as if they had been computed before,
    with the positions of the rows alone."""
    from transformers import DynamicCache

    model = adapted(family, "prefix_tuning", length=P, mlp=7)
    inputs = rows(family)
    found = logits(model, **inputs)
    cache = DynamicCache()
    prefixes = [m for m in model.modules() if isinstance(m, KeyValuePrefix)]
    for at, prefix in enumerate(prefixes):
        cache.update(*prefix.keys_values(B).detach(), at)
    assert at == 1
    reference = logits(
        plain(family), input_ids=inputs["input_ids"], past_key_values=cache,
        attention_mask=torch.ones(B, P + T), position_ids=torch.arange(T)[None].expand(B, -1),
    )  # fmt: skip
    assert torch.allclose(found, reference, atol=1e-10)


@pytest.mark.parametrize("method", PREFIXED)
@pytest.mark.parametrize("family", [*KINDS, "gpt2", "llama"])
def test_padding_changes_nothing(family: str, method: str) -> None:
    """Reference: each row alone. Padding is on the left for decoders, where generating wants it."""
    model = adapted(family, method)
    inputs = rows(family)
    ids, zeros = inputs["input_ids"], torch.zeros(1, 2, dtype=torch.long)
    short, mask = ids[1:, 2:], torch.ones_like(ids)
    left = family in ("decoder", "gpt2", "llama")
    order = [zeros, short] if left else [short, zeros]
    padded = torch.cat([ids[:1], torch.cat(order, 1)])
    (mask[1, :2] if left else mask[1, -2:]).zero_()
    others: dict[str, Any] = {}
    if family == "encoder_decoder":
        others["decoder_input_ids"] = inputs["decoder_input_ids"]
    if family in ("gpt2", "llama"):
        others["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    together = logits(model, input_ids=padded, attention_mask=mask, **others)
    alone = {k: v[1:] for k, v in others.items() if k != "position_ids"}
    one = logits(model, input_ids=short, attention_mask=torch.ones_like(short), **alone)
    if family == "encoder_decoder":
        assert torch.allclose(together[1:], one, atol=1e-9)
        return
    assert torch.allclose(together[1:, 2:] if left else together[1:, :-2], one, atol=1e-9)


@pytest.mark.parametrize("method", PREFIXED)
@pytest.mark.parametrize("family", ["decoder", "gpt2", "llama", "encoder_decoder"])
def test_no_token_learns_of_those_behind_it(family: str, method: str) -> None:
    """Behaviour: another last token leaves the outputs before it alone; gates are for a token."""
    model = adapted(family, method)
    inputs = rows(family)
    before = logits(model, **inputs)
    name = "decoder_input_ids" if family == "encoder_decoder" else "input_ids"
    inputs[name] = inputs[name].clone()
    inputs[name][:, -1] = 3
    after = logits(model, **inputs)
    assert torch.allclose(before[:, :-1], after[:, :-1], atol=1e-12)
    assert not torch.allclose(before[:, -1], after[:, -1])


@pytest.mark.parametrize("method", PREFIXED)
@pytest.mark.parametrize("family", ["encoder_decoder", "gpt2", "llama"])
def test_generating_with_a_cache_equals_the_forward_pass(family: str, method: str) -> None:
    """Reference: argmax of whole passes. The keys between encoder and decoder are computed once."""
    model = adapted(family, method)
    inputs = rows(family)
    inputs.pop("decoder_input_ids", None)
    out = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    ids = (
        torch.zeros(B, 1, dtype=torch.long) if family == "encoder_decoder" else inputs["input_ids"]
    )
    for _ in range(5):
        if family == "encoder_decoder":
            scores = logits(model, **inputs, decoder_input_ids=ids)[:, -1]
        else:
            scores = logits(model, input_ids=ids)[:, -1]
        scores[:, 2] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, ids)


def trained(method: str, family: str = "encoder_decoder", config: Any = None, **fields: Any) -> int:
    with torch.device("meta"):
        from transformers import T5ForConditionalGeneration

        model = T5ForConditionalGeneration(config) if config else plain(family)
        part = registry.load("method", method)(**fields)
        out = part.apply(model.requires_grad_(False), map_blocks(model))
    return sum(p.numel() for p in out.parameters() if p.requires_grad)


def test_counts_of_t5_large() -> None:
    """Closed form: flat 72 x 2 p d; with a network p d + d h + h + 2 L d (h + 1) for each of three
    groups; the adapters and gates of the other two beside it."""
    from transformers import T5Config

    large = T5Config(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16)
    group = lambda p, h: p * 1024 + 1024 * h + h + 2 * 24 * 1024 * (h + 1)
    assert trained("prefix_tuning", config=large, mlp=None) == 72 * 2 * 30 * 1024 == 4_423_680
    assert trained("prefix_tuning", config=large) == 3 * group(30, 512) == 77_311_488
    parallel = 48 * (2 * 1024 * 512 + 512 + 1024)
    assert trained("mam", config=large) == 3 * group(30, 800) + parallel == 171_069_792
    products, adapters = 144 * 8 * 2048, 48 * (2 * 1024 * 64 + 64 + 1024)
    gates = (144 + 72 + 48) * 1025
    united = products + 3 * group(10, 512) + adapters + gates
    assert trained("unipelt", config=large) == united == 86_223_624


def test_counts_where_heads_are_not_as_wide_as_the_model() -> None:
    """Closed form: the inner width K E in the place of d, once for each attention."""
    assert trained("prefix_tuning", mlp=None, length=P) == 6 * 2 * P * 24
    assert trained("prefix_tuning", mlp=7, length=P) == 3 * (P * 16 + 17 * 7) + 6 * 2 * 24 * 8
    assert trained("prefix_tuning", "llama", mlp=None, length=P) == 2 * 2 * P * 16


@pytest.mark.parametrize("method", PREFIXED)
@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_flattened_answers_as_before_and_loads(family: str, method: str, tmp_path: Path) -> None:
    """Reference: the adapter with its network. Equal but for the order of a sum."""
    from peft import PeftModel

    model = adapted(family, method, mlp=7)
    before, inputs = logits(model, **rows(family)), rows(family)
    flatten(model)
    assert not any("vectors" in n or ".down.bias" in n and "prefix" in n
                   for n, _ in model.named_parameters())  # fmt: skip
    assert torch.allclose(logits(model, **inputs), before, atol=1e-12)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again: Any = PeftModel.from_pretrained(plain(family), tmp_path, low_cpu_mem_usage=low)
        assert torch.allclose(logits(again.double(), **inputs), before, atol=1e-6)


@pytest.mark.parametrize("method", PREFIXED)
@pytest.mark.parametrize("family", [*KINDS, "gpt2", "llama"])
def test_recomputed_blocks_have_the_same_gradients(family: str, method: str) -> None:
    """Reference: the same without checkpointing."""
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model = adapted(family, method, mlp=7, **WIDE.get(method, {})).train()
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                nn.init.normal_(parameter)
        if again:
            checkpoint_blocks(model.get_base_model())
        inputs = rows(family)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None and one.any()
        assert torch.allclose(one, other, atol=1e-12)


def test_low_rank_products_and_adapters_are_weighed_by_their_gates() -> None:
    """Closed form: `W x + b + g (alpha / R) B A x` and `y + g(y) A(y)`, each token with its own
    `g = sigmoid(w h + b)`, in float64; a gate starts near 1/2, and there is nothing to fold."""
    from lowres.core.delta import Delta
    from lowres.methods._token_gates import GatedAdapter, GatedLowRank

    torch.manual_seed(0)
    base, x = nn.Linear(D, 24).double(), torch.randn(B, T, D).double()
    product = GatedLowRank(base, {"rank": 4, "alpha": 6.0}).double()
    behind = GatedAdapter(base, {"reduction": 3, "activation": "relu"}).double()
    y = base(x)
    for delta, hidden in ((product, x), (behind, y)):
        assert torch.allclose(delta.gate(hidden), torch.full((B, T, 1), 0.5).double(), atol=0.1)
        assert torch.equal(delta.around(base, x), y) and type(delta).fold is Delta.fold
        for parameter in delta.parameters():
            nn.init.normal_(parameter)
    w, b = product.gate.layer.weight[0], product.gate.layer.bias
    g = 1 / (1 + torch.exp(-(x * w).sum(-1) - b))
    added = torch.einsum("or,ri,bti->bto", product.b.weight, product.a.weight, x) * 6 / 4
    torch.testing.assert_close(
        product.around(base, x), y + g[..., None] * added, atol=1e-12, rtol=0
    )
    w, b = behind.gate.layer.weight[0], behind.gate.layer.bias
    g = 1 / (1 + torch.exp(-(y * w).sum(-1) - b))
    down, up = behind.adapter.down, behind.adapter.up
    added = (y @ down.weight.T + down.bias).clamp(0) @ up.weight.T + up.bias
    torch.testing.assert_close(behind.around(base, x), y + g[..., None] * added, atol=1e-12, rtol=0)


def test_gates_that_are_one_leave_the_parts_as_they_are() -> None:
    """Reference: `prefix_tuning` with the same tables, where the other parts start at zero."""
    united = adapted("decoder", "unipelt", mlp=None, length=P)
    alone = adapted("decoder", "prefix_tuning", mlp=None, length=P)
    sides = [[m for m in x.modules() if isinstance(m, KeyValuePrefix)] for x in (united, alone)]
    for one, other in zip(*sides, strict=True):
        other.table.data.copy_(one.table.data)
        one.gate.layer.bias.data.fill_(40.0)
    inputs = rows("decoder")
    assert torch.allclose(logits(united, **inputs), logits(alone, **inputs), atol=1e-10)


@pytest.mark.parametrize("method", PREFIXED)
def test_frozen_blocks_have_no_prefix(method: str, recipe: Callable[..., Any]) -> None:
    """Behaviour: what is shared lies in the first trained block of each group."""
    freezing = {"name": "prefix", "frozen": 1}
    one = recipe("encoder_decoder", method=method, objective="label_words", freezing=freezing)
    built = build(one)
    places = [n for n, m in built.model.named_modules() if isinstance(m, KeyValuePrefix)]
    owners = [n for n, m in built.model.named_modules() if hasattr(m, "vectors")]
    assert len(places) == 5 and not any("model.encoder.block.0." in n for n in places)
    assert len(owners) == 3


@pytest.mark.parametrize("method", PREFIXED)
def test_another_attention_function_is_refused(method: str, recipe: Callable[..., Any]) -> None:
    """Behaviour: a prefix would be passed by in silence, when made as when loaded."""
    with pytest.raises(InputError, match="model.attention"):
        build(recipe(method=method, model={"attention": "eager"}))
    config = adapted("decoder", method).peft_config["default"]
    other = plain("decoder")
    other.set_attn_implementation("eager")
    with pytest.raises(InputError, match="model.attention"):
        from peft import get_peft_model

        get_peft_model(other, config)


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
@pytest.mark.parametrize("method", PREFIXED)
def test_switching_the_attention_function_afterwards_is_an_error(method: str, kind: str) -> None:
    """Behaviour: the next pass stops instead of passing the prefixes by; without the adapter, and
    switched back, it works."""
    model = adapted(kind, method)
    asked = rows(kind)
    before = logits(model, **asked)
    parts = [model] if kind == "decoder" else [model, model.get_encoder(), model.get_decoder()]
    for part in parts:
        part.set_attn_implementation("eager")
        with pytest.raises(LowresError, match="set_attn_implementation"):
            model(**asked)
        with model.disable_adapter():
            model(**asked)
        part.set_attn_implementation("sdpa")
    assert torch.equal(logits(model, **asked), before)


@pytest.mark.parametrize("method", PREFIXED)
def test_packed_rows_are_rows_alone(
    method: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Reference: likelihoods of each row by itself; every row sees the prefix and no other row."""
    from lowres.core.example import collate

    (tmp_path / "text.txt").write_text(
        "\n\n\n".join(f"The {w} sees. " * (2 + i % 3) for i, w in enumerate("abcdefgh"))
    )
    task = {"name": "text", "files": [str(tmp_path / "text.txt")]}
    one = recipe(task=task, method=method, objective="next_token", levers=["sequence_packing"])
    built = build(one)
    built.model.double()
    batch_rows = built.train_rows[:4]
    with torch.no_grad():
        (batch,) = micro_batches(one, built.learner, batch_rows, 4)
        together = built.learner.token_logprobs(batch)
        singly = [built.learner.token_logprobs(collate([row], 0)) for row in batch_rows]
    assert torch.allclose(together, torch.cat(singly), atol=1e-7)


LEVERS = ("tiled_mlp", "frozen_offload", "activation_offload", "gradient_checkpointing")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lever", LEVERS)
@pytest.mark.parametrize("method", [*PREFIXED, "s4"])
def test_levers_that_reach_into_blocks_change_no_gradient(
    method: str, lever: str, kind: str, recipe: Callable[..., Any]
) -> None:
    """Reference: the recipe without the lever, with parameters far from where they start."""
    if lever == "tiled_mlp" and kind == "decoder":
        pytest.skip("OPT's feed-forward part is no module of its own")
    found = []
    for levers in ([], [lever]):
        one = recipe(kind, method=method, objective="label_words", levers=levers)
        found.append(far_gradients(one)[1])
    for plain_one, pulled in zip(*found, strict=True):
        assert plain_one is not None and torch.allclose(plain_one, pulled, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", PREFIXED)
def test_it_trains_over_four_bits(method: str, kind: str, recipe: Callable[..., Any]) -> None:
    """Behaviour: every trained parameter moves; packed weights stay."""
    objective = "classification" if kind == "encoder" else "label_words"
    fields = {"name": method, **WIDE.get(method, {})}
    one = recipe(kind, method=fields, objective=objective, levers=["nf4_weights"])
    all_move(one)
