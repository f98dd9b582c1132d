"""Logits in slices: the same losses and gradients, no (tokens, vocabulary) tensor, exact plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowres
from lowres.core.errors import InputError
from lowres.core.example import IGNORED
from lowres.core.reading import load_recipe
from lowres.levers._summed import used_in_slices
from lowres.making.build import build
from lowres.memory import device as devices
from lowres.memory.live import LiveBytes
from lowres.planning.plan import plan
from tests.conftest import sampled

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = {
    "name": "text", "files": [str(ROOT / "docs" / "start.md")], "eval_examples": 2,
    "valid_files": [str(ROOT / "docs" / "adding.md")],
}  # fmt: skip
NEXT = {"task": TEXT, "objective": "next_token"}
CHUNKED = [{"name": "chunked_logits", "chunk": 5}]


class Tallest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most rows of any tensor whose last dimension is the vocabulary, weights aside."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary, self.rows = vocabulary, 0
        self.weights = (hidden, vocabulary)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.shape[-1:] == (self.vocabulary,):
                if leaf.shape == self.weights:
                    continue
                self.rows = max(self.rows, leaf.numel() // self.vocabulary)
        return out


def gradients(learner: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities, and the gradients of their weighted sum."""
    learner.base.zero_grad()
    found = learner.token_logprobs(batch)
    (found * torch.linspace(0.5, 1.5, found.numel())).sum().backward()
    named = learner.base.named_parameters()
    return found.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def plain(learner: Any) -> Any:
    """The learner without the lever, over the same model."""
    from lowres.core.learner import Learner

    return Learner(**{f.name: getattr(learner, f.name) for f in dataclasses.fields(Learner)})


def batch_of(built: Any) -> Any:
    """Four rows of which some positions, and the whole of the second, ask nothing."""
    batch = built.collator(built.train_rows[:4])
    batch["labels"][0, 3:9] = IGNORED
    batch["labels"][1] = IGNORED
    return batch


def same(learner: Any, batch: Any) -> None:
    ours, our_gradients = gradients(learner, batch)
    theirs, their_gradients = gradients(plain(learner), batch)
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (ours == 0).sum() == (theirs == 0).sum() > batch["labels"].shape[1]
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        assert torch.allclose(our_gradients[name], gradient, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_losses_and_gradients_are_those_of_all_logits_at_once(
    kind: str, chunk: int, recipe: Callable[..., Any]
) -> None:
    """Reference: the learner without the lever, over the same weights; rows and positions without
    a target among them."""
    built = build(recipe(kind, levers=[{"name": "chunked_logits", "chunk": chunk}], **NEXT))
    same(built.learner, batch_of(built))


@pytest.mark.parametrize("slices", [2, 5])
def test_gradients_of_a_trained_head_are_summed_in_place(slices: int) -> None:
    """Closed form: one of the weight's size, the sum, where autograd by itself needs three: beside
    it what is added and the new sum."""
    torch.manual_seed(0)
    head, given = nn.Linear(400, 1000), torch.randn(10, 400)
    found, biases, peaks = [], [], []
    for one in (head, used_in_slices(head, slices, given.device)):
        head.zero_grad()
        with LiveBytes("cpu", [head.weight]) as live:
            torch.stack([one(part).exp().sum() for part in given.chunk(slices)]).sum().backward()
        peaks.append(live.peak_bytes / (head.weight.numel() * 4) - 1)
        found.append(head.weight.grad)
        biases.append(head.bias.grad)
    assert torch.allclose(*found, rtol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(*biases)  # type: ignore[arg-type]
    assert 3 <= peaks[0] < 3.2 and 1 <= peaks[1] < 1.2


@pytest.mark.parametrize("alone", ["one slice", "frozen", "hooked", "no linear layer", "autocast"])
def test_a_head_is_used_as_it_is_where_nothing_is_to_be_summed(alone: str) -> None:
    """Behaviour: hooks of a head must run, and autocast keeps a narrow copy for all uses."""
    head: nn.Module = nn.Linear(4, 8)
    if alone == "no linear layer":
        head = nn.Sequential(head)
    if alone == "hooked":
        head.register_forward_hook(lambda *_: None)
    head.requires_grad_(alone != "frozen")
    with torch.autocast("cpu", torch.bfloat16, enabled=alone == "autocast"):
        slices = 1 if alone == "one slice" else 2
        assert used_in_slices(head, slices, torch.device("cpu")) is head


def test_adapters_on_the_head_are_trained(recipe: Callable[..., Any]) -> None:
    """Reference: the learner without the lever; the head's own adapter has a gradient."""
    import peft

    built = build(recipe(levers=CHUNKED, **NEXT))
    config = peft.LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(built.model, config)  # type: ignore[arg-type]
    learner = dataclasses.replace(built.learner, module=adapted, base=adapted)
    same(learner, batch_of(built))
    found = gradients(learner, batch_of(built))[1]
    assert any("lm_head.lora_A" in name and g.abs().max() > 0 for name, g in found.items())


TAILS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "bart": {
        "encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer_maker: Any) -> Callable[..., Path]:
    """A folder with a tiny model of a type."""

    def make(model_type: str, **changes: Any) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

        sizes = {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2,
        } if model_type != "bart" else {}  # fmt: skip
        config = AutoConfig.for_model(
            model_type, vocab_size=640, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            max_position_embeddings=64, **sizes, **changes,
        )  # fmt: skip
        torch.manual_seed(0)
        auto: Any = AutoModelForSeq2SeqLM if model_type == "bart" else AutoModelForCausalLM
        model = auto.from_config(config)
        for parameter in model.parameters():
            parameter.data.mul_(5.0)
        if model_type == "bart":
            model.final_logits_bias.normal_()
        folder = tmp_path_factory.mktemp(model_type)
        model.save_pretrained(folder)
        tokenizer_maker().save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("model_type", TAILS)
def test_what_a_model_does_behind_its_head_is_done_to_each_slice(
    model_type: str, made: Callable[..., Path], recipe: Callable[..., Any]
) -> None:
    """Reference: the model's own logits; caps, scales and biases of the logits change them."""
    checkpoint = str(made(model_type, **TAILS[model_type]))
    built = build(
        recipe(model={"checkpoint": checkpoint, "attention": "eager"}, levers=CHUNKED, **NEXT)
    )
    same(built.learner, batch_of(built))


def test_a_model_that_does_something_unknown_behind_its_head_is_refused(
    made: Callable[..., Path], recipe: Callable[..., Any]
) -> None:
    """Behaviour: a cap that stands under another name in the configuration."""
    checkpoint = str(made("gemma2", **TAILS["gemma2"]))
    built = build(
        recipe(model={"checkpoint": checkpoint, "attention": "eager"}, levers=CHUNKED, **NEXT)
    )
    inner: Any = built.learner.base
    forward = inner.forward

    def other(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits.exp()
        return out

    inner.forward = other
    with pytest.raises(InputError, match="Exp"):
        built.learner.token_logprobs(batch_of(built))


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_no_more_than_a_chunk_of_logits_is_there(kind: str, recipe: Callable[..., Any]) -> None:
    """Closed form: no tensor of the step has more than `chunk` rows of the vocabulary's width."""
    built = build(recipe(kind, method="lora", levers=CHUNKED, **NEXT))
    batch = batch_of(built)
    rows = []
    for learner in (plain(built.learner), built.learner):
        with Tallest(640, 16) as seen:
            learner.token_logprobs(batch).sum().backward()
        rows.append(seen.rows)
    assert rows[1] == 5 and rows[0] >= batch["labels"].numel()


def test_an_encoder_makes_the_logits_of_the_mask_alone(recipe: Callable[..., Any]) -> None:
    """Closed form: as many rows of the vocabulary's width as rows and columns asked for."""
    built = build(recipe("encoder", method="lora", levers=CHUNKED, objective="label_words"))
    batch = built.collator(built.train_rows[:4])
    positions = torch.tensor([1, 4])
    with Tallest(640, 16) as seen:
        ours = built.learner.logits(batch, positions)
        ours.sum().backward()
    assert seen.rows == 4 * 2
    assert torch.allclose(ours, plain(built.learner).logits(batch, positions), atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    ("kind", "precision"), sampled(["decoder", "encoder_decoder"], ["no", "bf16"], every=2)
)
def test_planned_bytes_are_measured_bytes(
    kind: str, precision: str, method: str, recipe: Callable[..., Any], in_folder: Any
) -> None:
    """Reference: a real run; steps and evaluation to the byte."""
    one = recipe(kind, levers=CHUNKED, loop={"precision": precision}, method=method, **NEXT)
    record = lowres.run(one, quiet=True)
    assert record.plan is not None, record.events
    for phase in ("first_step", "steady_steps", "evaluate"):
        planned = record.plan["phases"][phase]["live_bytes"]
        assert planned == record.measured.phases[phase].live_bytes, phase  # type: ignore[index]


def test_the_planned_peak_of_a_card_falls_by_the_logits(recipe: Callable[..., Any]) -> None:
    """Closed form: what falls away is at least the float32 scores of all but a chunk of tokens."""
    raw = recipe(
        model={"checkpoint": "package:lowres/assets/tiny_lm"}, method="lora", **NEXT,
        loop={"micro_batch_size": 8, "global_batch_size": 8, "max_length": 256},
    ).resolved()  # fmt: skip
    before, after = (
        plan(load_recipe(raw | {"levers": levers}), devices.generic(8.0))
        for levers in ([], [{"name": "chunked_logits", "chunk": 128}])
    )
    peaks = [p.phases["steady_steps"].live_bytes for p in (before, after)]
    assert peaks[0] - peaks[1] > 4 * (8 * 256 - 3 * 128) * 4096
    assert after.phases["evaluate"].live_bytes < before.phases["evaluate"].live_bytes


def test_a_classification_head_is_refused(recipe: Callable[..., Any]) -> None:
    """Behaviour: by the recipe alone; the sentence names what works."""
    with pytest.raises(InputError, match="next_token or label_words"):
        recipe(levers=CHUNKED, objective="classification")
