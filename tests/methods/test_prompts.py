"""Soft prompts: counts, the columns that are left out, padding, generation, places and limits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from lowres.bridges import peft as bridge
from lowres.bridges import transformers
from lowres.bridges.blocks import checkpoint_blocks, map_blocks
from lowres.core import registry
from lowres.core.errors import InputError, LowresError
from lowres.core.example import IGNORED
from lowres.core.learner import Learner
from lowres.levers.chunked_logits import ChunkedLearner
from lowres.making.build import build
from lowres.making.weights import casts, types_of
from tests.conftest import sample_part

METHODS = ("prompt_tuning", "p_tuning")
P, D, H = 3, 16, 5
# Two rows, the second shorter; padding is 0.
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
MASK = (IDS != 0).long()
LEFT = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 10, 11, 12]])


def llama(cls: Any = LlamaForCausalLM) -> Any:
    config = LlamaConfig(
        vocab_size=32, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return made(cls, config)


def gpt2(cls: Any = GPT2LMHeadModel) -> Any:
    config = GPT2Config(
        vocab_size=32, n_embd=D, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return made(cls, config)


def bert() -> Any:
    config = BertConfig(
        vocab_size=32, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pad_token_id=0,
    )  # fmt: skip
    return made(BertForMaskedLM, config)


def t5() -> Any:
    config = T5Config(
        vocab_size=32, d_model=D, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    return made(T5ForConditionalGeneration, config)


def made(cls: Any, config: Any) -> Any:
    """A model far from zero."""
    torch.manual_seed(0)
    model = cls(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    return model


def adapt(model: Any, name: str = "prompt_tuning", **fields: Any) -> Any:
    one = registry.load("method", name)(**({"length": P} | fields))
    torch.manual_seed(1)
    return one.apply(model, map_blocks(model)).eval()


def learner(model: Any, kind: Any, head: Any, cls: Any = Learner) -> Any:
    blocks = map_blocks(bridge.unwrap_adapted(model))
    return cls(model, model, None, kind, head, blocks)


def count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def vectors(model: Any) -> torch.Tensor:
    """What stands before a row, (P, D)."""
    found: torch.Tensor = model.get_prompt(1)[0].detach()
    return found


@pytest.mark.parametrize("make", [llama, gpt2, bert, t5])
def test_what_trains_is_the_prompt_or_what_makes_it(make: Callable[[], Any]) -> None:
    """Closed form: p d; of the networks, p d beside their weights and biases."""
    assert count(adapt(make())) == P * D
    mlp = (D * H + H) + (H * H + H) + (H * D + D)
    assert count(adapt(make(), "p_tuning", hidden=H)) == P * D + mlp
    lstm = sum(2 * 4 * H * (i + H + 2) for i in (D, 2 * H))
    behind = (2 * H * 2 * H + 2 * H) + (2 * H * D + D)
    assert count(adapt(make(), "p_tuning", encoder="lstm", hidden=H)) == P * D + lstm + behind


def test_as_many_train_as_in_published_comparisons() -> None:
    """Reference: LoRETTA (arXiv 2402.11417) prints .23 M for P-tuning of a model of DeBERTa-base's
    width; 20 vectors of Llama-2-7B's are 82 k.
    """
    with torch.device("meta"):
        wide = T5ForConditionalGeneration(
            T5Config(vocab_size=32, d_model=768, d_kv=64, d_ff=8, num_layers=1, num_heads=1)
        )
    assert round(count(adapt(wide, "p_tuning", length=20)) / 1e6, 2) == 0.23
    with torch.device("meta"):
        wide = T5ForConditionalGeneration(
            T5Config(vocab_size=32, d_model=4096, d_kv=64, d_ff=8, num_layers=1, num_heads=1)
        )
    assert count(adapt(wide, length=20)) == 81_920


def test_vectors_start_at_embeddings_of_the_vocabulary_or_at_random() -> None:
    """Behaviour."""
    model = llama()
    table = model.get_input_embeddings().weight
    assert all((row == table).all(-1).any() for row in vectors(adapt(model)))
    assert not any((row == table).all(-1).any() for row in vectors(adapt(llama(), init="random")))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("make", "kind", "head"), [(llama, "decoder", "causal"), (gpt2, "decoder", "causal"),
                               (bert, "encoder", "masked")],
)  # fmt: skip
def test_logits_are_those_of_the_own_tokens_behind_the_vectors(
    name: str, make: Callable[[], Any], kind: str, head: str
) -> None:
    """Reference: the plain model, given the embeddings, by hand. With columns asked for, and the
    head taken away."""
    plain = make()
    model = adapt(make(), name)
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    embedded = plain.get_input_embeddings()(IDS)
    inputs = torch.cat([vectors(model).expand(2, -1, -1), embedded], 1)
    mask = F.pad(MASK, (P, 0), value=1)
    with torch.no_grad():
        whole = plain(inputs_embeds=inputs, attention_mask=mask).logits
        own = whole[:, P:]
        asked = learner(model, kind, head)
        torch.testing.assert_close(asked.logits(batch), own)
        columns = torch.tensor([0, 3])
        torch.testing.assert_close(asked.logits(batch, columns), own[:, columns])
        chunked = learner(model, kind, head, ChunkedLearner)
        torch.testing.assert_close(chunked.logits(batch, columns), own[:, columns])
        torch.testing.assert_close(chunked.token_logprobs(batch), asked.token_logprobs(batch))
        # What PEFT gives itself stays as PEFT's users know it.
        torch.testing.assert_close(model(input_ids=IDS, attention_mask=MASK).logits, whole)


def test_an_encoder_has_the_vectors_and_a_decoder_behind_it_none() -> None:
    """Reference: the plain model, given the embeddings, by hand."""
    plain, model = t5(), adapt(t5())
    inputs = torch.cat([vectors(model).expand(2, -1, -1), plain.get_input_embeddings()(IDS)], 1)
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS[:, :2]}
    asked = learner(model, "encoder_decoder", "seq2seq")
    with torch.no_grad():
        whole = plain(inputs_embeds=inputs, attention_mask=F.pad(MASK, (P, 0), value=1),
                      decoder_input_ids=asked.decoder_inputs(batch["labels"])).logits  # fmt: skip
        assert whole.shape[1] == 2
        torch.testing.assert_close(asked.logits(batch), whole)


@pytest.mark.parametrize("make", [llama, gpt2, bert, t5])
def test_the_model_itself_gives_a_loss(make: Callable[[], Any]) -> None:
    """Reference: the labels' logits; for a training loop of one's own."""
    model = adapt(make())
    labels = IDS.masked_fill(MASK == 0, IGNORED)
    out = model(input_ids=IDS, attention_mask=MASK, labels=labels)
    logits, wanted = out.logits[:, -5:], labels
    if make in (llama, gpt2):
        logits, wanted = out.logits[:, -6:-1], labels
    expected = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_row_padded_on_the_left_is_continued_as_alone(make: Callable[[], Any]) -> None:
    """Reference: the row without padding; a model with rotary and one with trained positions. The
    first token and the later ones take different paths through PEFT."""
    model = adapt(make(), init="random")
    how: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False,
                           "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    both = model.generate(input_ids=LEFT, attention_mask=(LEFT != 0).long(), **how)
    ids = LEFT[1:, 2:]
    alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    assert torch.equal(both.sequences[1, 5:], alone.sequences[0, 3:])
    for together, one in zip(both.logits, alone.logits, strict=True):
        torch.testing.assert_close(together[1], one[0])


def test_an_encoder_decoder_generates_what_its_forward_pass_says() -> None:
    """Reference: argmax of the forward pass, token by token."""
    model = adapt(t5(), init="random")
    out = model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=3, min_new_tokens=3,
                         do_sample=False)  # fmt: skip
    said = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(3):
        with torch.no_grad():
            scores = model(
                input_ids=IDS, attention_mask=MASK, decoder_input_ids=said
            ).logits[:, -1]  # fmt: skip
        scores[:, 2] = float("-inf")
        said = torch.cat([said, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, said)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_decoders_head_reads_the_last_token_whatever_the_padding(
    make: Callable[[Any], Any], tmp_path: Path
) -> None:
    """Reference: PEFT's own forward pass of each row alone; the same after loading."""
    heads = {llama: LlamaForSequenceClassification, gpt2: GPT2ForSequenceClassification}
    model = adapt(make(heads[make]), init="random")
    rows = [IDS[:1], IDS[1:, :3]]
    with torch.no_grad():
        alone = [peft.PeftModelForSequenceClassification.forward(model, r).logits for r in rows]
        for ids in (IDS, LEFT):
            found = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
            torch.testing.assert_close(found, torch.cat(alone))
        whole = model(input_ids=IDS, attention_mask=MASK).logits
        model.save_pretrained(tmp_path)
        again = bridge.load_adapter(make(heads[make]), tmp_path)
        assert torch.equal(again(input_ids=IDS, attention_mask=MASK).logits, whole)


@pytest.mark.parametrize("name", METHODS)
def test_switched_off_it_generates_as_the_plain_model_and_a_copy_is_its_own(name: str) -> None:
    """Reference: the plain model."""
    plain, model = llama(), adapt(llama(), name)
    how = {"input_ids": IDS[:1], "max_new_tokens": 3, "do_sample": False}
    with model.disable_adapter():
        assert torch.equal(model.generate(**how), plain.generate(**how))
    other = copy.deepcopy(model)
    other.prompt_encoder["default"].embedding.weight.data.add_(1.0)
    assert not torch.equal(other(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_is_the_vectors_alone(name: str, tmp_path: Path) -> None:
    """Closed form: p d numbers, whatever made them; loaded by PEFT alone, the same logits."""
    from safetensors.torch import load_file

    model = adapt(llama(), name)
    transformers.save(model, _NoTokenizer(), tmp_path)
    (saved,) = load_file(tmp_path / "adapter_model.safetensors").values()
    assert saved.shape == (P, D)
    loaded: Any = peft.PeftModel.from_pretrained(llama(), str(tmp_path))
    assert type(loaded) is peft.PeftModelForCausalLM
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_vectors_are_made_alike_with_autocast_and_when_they_are_saved(
    encoder: str, tmp_path: Path
) -> None:
    """Reference: the trained model under autocast; loaded, where no network makes the vectors."""
    model = adapt(llama(), "p_tuning", encoder=encoder)
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS, labels=IDS).loss.backward()
        kept = model(IDS).logits
        model.save_pretrained(tmp_path)
        loaded = bridge.load_adapter(llama(), tmp_path)
        assert torch.equal(loaded(IDS).logits, kept)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class _NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        pass


@pytest.mark.parametrize("name", METHODS)
def test_recomputing_blocks_changes_no_gradient(name: str) -> None:
    """Reference: the same model without."""
    found = []
    for recompute in (False, True):
        model = adapt(llama(), name)
        if recompute:
            checkpoint_blocks(bridge.unwrap_adapted(model))
        model.train()
        model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for key, gradient in found[0].items():
        assert gradient is not None and gradient.abs().sum() > 0
        assert torch.equal(gradient, found[1][key]), key


@pytest.mark.parametrize("lever", ["nf4_weights", "int8_weights"])
@pytest.mark.parametrize("name", METHODS)
def test_it_trains_around_weights_in_few_bits(
    name: str, lever: str, recipe: Callable[..., Any]
) -> None:
    """Behaviour: a finite gradient for everything that trains."""
    one = recipe("decoder", method=name, objective="label_words", levers=[lever],
                 model={"dtype": "bfloat16"}, loop={"precision": "bf16"})  # fmt: skip
    built = build(one)
    one.objective.loss(built.learner, built.collator(built.train_rows[:4])).backward()
    trained = [p for p in built.model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"freezing": {"name": "prefix", "frozen": 1}}, "down to the input"),
        ({"freezing": sample_part("freezing", "fisher")}, "down to the input"),
        ({"freezing": sample_part("freezing", "lisa")}, "lie below all blocks"),
        ({"task": {"name": "grammaticality"}, "loop": {"max_length": 62}}, "62 .with 20 vectors of "
         "'prompt_tuning': 82. is more than the 64 positions"),
    ],
)  # fmt: skip
def test_what_it_cannot_work_with_is_refused(
    changes: dict[str, Any], says: str, recipe: Callable[..., Any]
) -> None:
    """Behaviour."""
    with pytest.raises(InputError, match=says):
        build(recipe("decoder", method="prompt_tuning", **changes))


def test_packed_rows_and_heads_that_look_for_ids_are_refused(recipe: Callable[..., Any]) -> None:
    """Behaviour."""
    text = {"name": "text", "files": [__file__]}
    with pytest.raises(InputError, match="one prompt for all of"):
        recipe("decoder", method="p_tuning", objective="next_token", task=text,
               levers=["sequence_packing"])  # fmt: skip
    with pytest.raises(InputError, match="decoder's input of the ids"):
        build(recipe("encoder_decoder", method="p_tuning"))


def test_a_model_without_a_table_of_positions_takes_longer_rows(recipe: Callable[..., Any]) -> None:
    """Behaviour: T5's tokenizer says 64, its relative positions have no end."""
    build(recipe("encoder_decoder", method="p_tuning", objective="label_words",
                 loop={"max_length": 62}))  # fmt: skip


def test_weights_are_known_by_their_names_in_the_plain_model() -> None:
    """Behaviour: what was cast after loading is told, though prompts prefix names otherwise."""
    model = llama().bfloat16()
    loaded = types_of(model)
    adapted = adapt(model)
    assert types_of(adapted) == loaded
    assert casts(loaded, adapted) is None
    adapted.float()
    told = casts(loaded, adapted)
    assert told is not None and told[0].startswith(f"cast: {len(loaded)} tensors")


def test_merging_is_refused() -> None:
    """Behaviour."""
    one = registry.load("method", "prompt_tuning")()
    with pytest.raises(LowresError, match="cannot be merged"):
        one.merge(adapt(llama()))


@pytest.mark.parametrize("name", METHODS)
def test_what_was_loaded_and_saved_again_is_loaded_again(name: str, tmp_path: Path) -> None:
    """Reference: the logits of the first."""
    model = adapt(llama(), name)
    model.save_pretrained(tmp_path / "a")
    bridge.load_adapter(llama(), tmp_path / "a").save_pretrained(tmp_path / "b")
    again = bridge.load_adapter(llama(), tmp_path / "b")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_keys_and_values_of_plain_peft_are_left_to_peft(tmp_path: Path) -> None:
    """Behaviour: they are prompt learning to PEFT, too."""
    heads = LlamaForSequenceClassification
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)
    peft.get_peft_model(llama(heads), config).save_pretrained(tmp_path)
    loaded = bridge.load_adapter(llama(heads), tmp_path)
    assert type(loaded) is peft.PeftModelForSequenceClassification


@pytest.mark.parametrize("make", [llama, gpt2])
def test_padding_on_the_left_changes_no_row(make: Callable[[], Any]) -> None:
    """Reference: the row alone."""
    model = adapt(make(), init="random")
    with torch.no_grad():
        padded = model(LEFT, attention_mask=(LEFT != 0).long()).logits[1, -3:]
        alone = model(LEFT[1:, 2:]).logits[0, -3:]
    torch.testing.assert_close(padded, alone)


def test_a_state_that_is_handed_on_passes_no_padding() -> None:
    """Reference: a row alone, continued by a model half of whose layers are recurrent."""
    from transformers import JambaConfig, JambaForCausalLM

    config = JambaConfig(
        vocab_size=32, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_experts=1, num_experts_per_tok=1,
        attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4,
        use_mamba_kernels=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = adapt(made(JambaForCausalLM, config), init="random")
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True,
           "return_dict_in_generate": True}  # fmt: skip
    padded = model.generate(input_ids=LEFT, attention_mask=(LEFT != 0).long(), **how)
    row = LEFT[1:, 2:]
    alone = model.generate(input_ids=row, attention_mask=torch.ones_like(row), **how)
    for theirs, ours in zip(padded.logits, alone.logits, strict=True):
        torch.testing.assert_close(theirs[1], ours[0], rtol=1e-4, atol=1e-5)


def test_a_configuration_with_names_of_its_own_is_served() -> None:
    """Reference: PEFT's own forward pass."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    config = DistilBertConfig(
        vocab_size=32, dim=D, hidden_dim=24, n_layers=2, n_heads=2, dropout=0.0,
        attention_dropout=0.0, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    model = adapt(made(DistilBertForMaskedLM, config), init="random")
    theirs = peft.PeftModelForFeatureExtraction.forward(model, IDS[:1]).logits
    assert torch.equal(model(IDS[:1]).logits, theirs) and theirs.shape[1] == IDS.shape[1] + P


@pytest.mark.parametrize("family", ["pegasus", "mamba2", "gemma3n"])
def test_models_that_treat_vectors_otherwise_than_words_are_refused(family: str) -> None:
    """Behaviour: before anything is put into the model. One scales the embeddings of ids alone, one
    has no attention, one embeds ids for every block."""
    from types import SimpleNamespace

    from transformers import (
        Mamba2Config,
        Mamba2ForCausalLM,
        PegasusConfig,
        PegasusForConditionalGeneration,
    )

    if family == "pegasus":
        config: Any = PegasusConfig(
            vocab_size=32, d_model=D, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24,
            decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2,
            scale_embedding=True,
        )  # fmt: skip
        model, reason = made(PegasusForConditionalGeneration, config), "scales"
    elif family == "mamba2":
        config = Mamba2Config(
            vocab_size=32, hidden_size=D, num_hidden_layers=1, num_heads=4, head_dim=8, n_groups=1,
            state_size=8,
        )  # fmt: skip
        model, reason = made(Mamba2ForCausalLM, config), "no attention"
    else:
        model, reason = llama(), "for every block"
        text = SimpleNamespace(num_attention_heads=2, hidden_size_per_layer_input=4)
        model.config.get_text_config = lambda: text
    with pytest.raises(InputError, match=reason):
        adapt(model)
