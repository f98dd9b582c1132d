"""How rows become micro-batches: what lies together, and that it changes no token's likelihood."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lowres
from lowres.core.batching import Batching, batching_of, in_order, padded
from lowres.core.errors import InputError
from lowres.core.example import IGNORED, Row, collate, real_tokens
from lowres.making.build import build, read
from lowres.making.gradients import micro_batches

PACKING, BUCKETING = "sequence_packing", "length_bucketing"


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The keys of a recipe that trains on answers of many lengths."""
    folder = tmp_path_factory.mktemp("gsm8k")
    for split in ("train", "test"):
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as table:
            for i in range(32):
                question = "the " * (18 if i % 4 == 0 else 1 + i % 3) + "?"
                row = {"question": question, "answer": f"{'a ' * (i % 5)}#### {i}"}
                table.write(json.dumps(row) + "\n")
    return {
        "task": {"name": "gsm8k", "folder": str(folder), "eval_examples": 2},
        "objective": {"name": "next_token", "max_new_tokens": 4},
    }


MODELS = {
    "opt": ("OPTConfig", {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32,
                          "dropout": 0.0}),
    "llama": ("LlamaConfig", {"hidden_size": 16, "intermediate_size": 32,
                              "num_key_value_heads": 1}),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64,
                            "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gpt_neox": ("GPTNeoXConfig", {"hidden_size": 16, "intermediate_size": 32}),
    "gemma3": ("Gemma3TextConfig", {"hidden_size": 16, "intermediate_size": 32, "head_dim": 8,
                                    "num_key_value_heads": 1, "sliding_window": 8,
                                    "layer_types": ["sliding_attention", "full_attention"]}),
    "mistral": ("MistralConfig", {"hidden_size": 16, "intermediate_size": 32, "sliding_window": 8,
                                  "num_key_value_heads": 1}),
}  # fmt: skip


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory, tokenizer_maker: Any) -> Callable[[str], str]:
    """A folder with a tiny decoder of a family, its weights far from zero."""
    import transformers

    def make(family: str, **changes: Any) -> str:
        name, fields = MODELS.get(family, (family, {}))
        common = {"vocab_size": 640, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
                  "eos_token_id": 2}  # fmt: skip
        config = getattr(transformers, name)(**common | fields | changes)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.3)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer_maker().save_pretrained(folder)
        return str(folder)

    return make


@pytest.mark.parametrize("attention, method", [("sdpa", "lora"), ("eager", "full")])
@pytest.mark.parametrize("family", MODELS)
def test_packed_tokens_have_the_likelihoods_of_rows_alone(
    family: str, attention: str, method: str, decoder: Any, recipe: Callable[..., Any], answers: Any
) -> None:
    """Reference: `token_logprobs` of each row by itself, in float64 (norms and rotations of some
    models stay in float32). Windows of attention are shorter than some rows."""
    model = {"checkpoint": decoder(family), "attention": attention}
    changes = answers | {"model": model, "method": method}
    alone, one = (recipe(levers=levers, **changes) for levers in ([], [PACKING]))
    built = build(alone)
    built.model.double()
    rows = built.train_rows[:6]
    with torch.no_grad():
        singly = [built.learner.token_logprobs(collate([row], 0)) for row in rows]
    built = build(one)
    built.model.double()
    (batch,) = micro_batches(one, built.learner, rows, 6)
    with torch.no_grad():
        together = built.learner.token_logprobs(batch)
    assert real_tokens(batch) == sum(row.length for row in rows)
    assert one.objective.targets(batch) == int((together != 0).sum())
    assert torch.allclose(together, torch.cat(singly), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", MODELS)
def test_a_kernel_without_a_mask_is_told_where_rows_begin(
    family: str, decoder: Any, recipe: Callable[..., Any], answers: Any
) -> None:
    """Behaviour: flash attention reads borders off `position_ids`; an attention function in its
    place sees what it would be given."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask
    from transformers.modeling_flash_attention_utils import _is_packed_sequence

    seen = []

    def kernel(module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any) -> Any:
        seen.append((mask, given.get("position_ids")))
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None

    AttentionInterface.register("borders_spy", kernel)
    AttentionMaskInterface.register("borders_spy", flash_attention_mask)
    one = recipe(model={"checkpoint": decoder(family)}, levers=[PACKING], **answers)
    built = build(one)
    built.model.set_attn_implementation("borders_spy")
    (batch,) = micro_batches(one, built.learner, built.train_rows[:4], 4)
    built.learner.token_logprobs(batch)
    assert len(seen) == 2
    assert all(mask is None and bool(_is_packed_sequence(at, 1)) for mask, at in seen)


def test_a_packed_batch_by_hand() -> None:
    """Closed form: two rows; the first label of each is not asked, nor is there a mask."""
    from lowres.core import registry

    rows = [
        Row("a", {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}, [IGNORED, 6, 7]),
        Row("b", {"input_ids": [8, 9], "attention_mask": [1, 1]}, [8, 9]),
    ]
    plain = Batching(in_order, collate, padded)
    packing = registry.load("lever", PACKING)().on_batching(plain)
    batch = packing.collate(rows, 0, "right")
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "labels": [[IGNORED, 6, 7, IGNORED, 9]],
    }


@pytest.mark.parametrize("levers", [[], [BUCKETING], [PACKING], [BUCKETING, PACKING],
                                    [PACKING, BUCKETING]])  # fmt: skip
def test_every_row_is_in_one_micro_batch(
    levers: list[str], recipe: Callable[..., Any], answers: Any
) -> None:
    """Behaviour: for each order of levers; `tokens` tells the size of the tensor."""
    batching = batching_of(recipe(levers=levers, **answers))
    lengths = [3, 9, 2, 30, 8, 1, 5]
    rows = [Row(str(i), {"input_ids": [7] * n}, [7] * n) for i, n in enumerate(lengths)]
    groups = batching.group(rows, 2)
    assert sorted(row.id for group in groups for row in group) == [row.id for row in rows]
    assert max(len(group) for group in groups) == 2
    for group in groups:
        elements = batching.collate(group, 0, "right")["input_ids"].numel()
        assert elements == batching.tokens([row.length for row in group])
    if BUCKETING in levers:
        assert [r.length for group in groups for r in group] == sorted(lengths, reverse=True)


def test_a_micro_batch_ends_before_the_row_that_would_not_fit(
    recipe: Callable[..., Any], answers: Any
) -> None:
    """Closed form: at most 32 tokens together, at most four rows, none split or moved."""
    lever = {"name": PACKING, "max_tokens": 32}
    batching = batching_of(recipe(levers=[lever], **answers))
    lengths = [30, 2, 1, 20, 20, 4, 4, 4, 4, 4]
    rows = [Row(str(i), {"input_ids": [7] * n}, [7] * n) for i, n in enumerate(lengths)]
    groups = [[row.length for row in group] for group in batching.group(rows, 4)]
    assert groups == [[30, 2], [1, 20], [20, 4, 4, 4], [4, 4]]


@pytest.mark.parametrize(
    # With both the longest rows of an update lie in one, whose mask takes more than their padding.
    "levers, smaller",
    [([BUCKETING], False), ([PACKING], True), ([BUCKETING, PACKING], False)],
)
def test_it_takes_the_padding_away(
    levers: list[str], smaller: bool, recipe: Callable[..., Any], answers: Any, in_folder: Any
) -> None:
    """Reference: measured live bytes on the CPU, equal to the plan to the byte, and the padded
    tokens of an update beside those without the lever."""
    from lowres.planning.portions import usual_work

    loop = {"loop": {"micro_batch_size": 4, "global_batch_size": 8, "max_length": 48}}
    found = []
    for chosen in ([], levers):
        one = recipe(levers=chosen, **answers, **loop)
        record = lowres.run(one, quiet=True)
        assert record.plan is not None, record.events
        for phase in ("first_step", "steady_steps"):
            planned = record.plan["phases"][phase]["live_bytes"]
            assert planned == record.measured.phases[phase].live_bytes, phase
        padded, real = usual_work(one, read(one).data)
        found.append((record.measured.phases["steady_steps"].live_bytes, padded, record.losses))
        assert padded >= real
        if PACKING in chosen:
            assert padded == real
    (before, padding, losses), (after, less, same) = found
    assert less < padding
    assert after < before or not smaller
    assert same == pytest.approx(losses, rel=1e-4)


REFUSED = {
    "a head over each row": ("decoder", {}, "asks for something of each row"),
    "an answer's column": ("decoder", {"objective": "label_words"}, "length_bucketing"),
    "an encoder-decoder": ("encoder_decoder", "answers", "needs a decoder"),
    "a cap below one row": ("decoder", {"max_tokens": 8}, "less than one row may have"),
    "code from elsewhere": ("decoder", {"model": {"trust_remote_code": True}}, "keep packed rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_packing_refuses_where_rows_would_touch(
    case: str, recipe: Callable[..., Any], answers: Any
) -> None:
    """Behaviour: the reason and the nearest lever, before weights are read."""
    kind, changes, reason = REFUSED[case]
    if changes == "answers":
        changes = answers
    changes = dict(changes)
    lever = {"name": PACKING, "max_tokens": changes.pop("max_tokens", None)}
    if lever["max_tokens"]:
        changes = answers
    with pytest.raises(InputError) as refusal:
        build(recipe(kind, levers=[lever], **changes))
    text = " ".join(problem.text for problem in refusal.value.problems)
    assert reason in text
    assert BUCKETING in text or "raise it" in text


@pytest.mark.parametrize("by", ["a lever", "an optimizer"])
def test_packing_refuses_to_cut_where_an_update_is_one_pass(
    by: str, recipe: Callable[..., Any], answers: Any
) -> None:
    """Behaviour: two rows of up to 32 tokens in one of up to 32 are refused, in one of up to 64
    they are not."""
    loop = {"max_length": 32, "micro_batch_size": 2, "global_batch_size": 2, "max_grad_norm": None}
    more = ["optimizer_in_backward"] if by == "a lever" else []
    rule: dict[str, Any] = {} if more else {"optimizer": {"name": "lomo", "lr": 0.1}}
    changes = {**answers, **rule, "loop": answers.get("loop", {}) | loop}
    make = lambda cap: recipe(
        "decoder", levers=[{"name": PACKING, "max_tokens": cap}, *more], **changes
    )
    with pytest.raises(InputError, match="updates in the backward pass of one"):
        make(32)
    make(64)


@pytest.mark.parametrize(
    "config, changes, reason",
    [
        ("BloomConfig", {"attention": "eager"}, "takes no position_ids"),
        ("FalconConfig", {"alibi": True}, "alibi"),
        ("Lfm2Config", {"intermediate_size": 32, "hidden_size": 16, "num_key_value_heads": 1,
                        "layer_types": ["conv", "full_attention"]}, "run on over rows"),
    ],
)  # fmt: skip
def test_packing_refuses_models_that_would_mix_rows(
    config: str, changes: Any, reason: str, decoder: Any, recipe: Callable[..., Any], answers: Any
) -> None:
    """Behaviour: models without positions, with weights by distance, with running blocks."""
    fields = {"hidden_size": 16, "n_layer": 2, "n_head": 2} | changes
    attention = fields.pop("attention", "sdpa")
    model = {"checkpoint": decoder(config, **fields), "attention": attention}
    with pytest.raises(InputError, match="sequence_packing") as refusal:
        build(recipe(model=model, levers=[PACKING], **answers))
    assert reason in refusal.value.problems[0].text
