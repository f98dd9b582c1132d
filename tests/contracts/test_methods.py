"""What every method promises, without naming one (docs/adding.md)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowres.core import registry
from lowres.core.errors import InputError
from lowres.making.build import Built, build
from lowres.run.written import stop_at_lost
from tests.conftest import KINDS, NO_PLACE, ROOT, no_place, sample_part, sampled

METHODS = registry.names("method")
HEADS = {"decoder": "next_token", "encoder": "classification", "encoder_decoder": "next_token"}
LETTERS = "abcdefghijklmnop"


def test_there_are_methods() -> None:
    """Reference: the files of the folder; and what is said to find no place is a method's."""
    files = (ROOT / "lowres" / "methods").glob("[!_]*.py")
    assert METHODS and METHODS == sorted(file.stem for file in files)
    assert {method for method, _, _ in NO_PLACE} <= set(METHODS)


def works(method: str, kind: str) -> bool:
    return no_place(method, kind, HEADS[kind]) is None


each = pytest.mark.parametrize(
    ("method", "kind"),
    [p for p in sampled(METHODS, KINDS, every=3) if works(*map(str, p.values))],
)
"""A method on a kind of model that has a place for it; in the fast suite each on one kind."""


@pytest.fixture
def make(recipe: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[Any, Built]]:
    """A recipe and what is built from it."""

    def made(kind: str, method: str, **changes: Any) -> tuple[Any, Built]:
        text = tmp_path / "text.txt"
        text.write_text("\n\n\n".join(f"The {w} sees the old {w}. " * 4 for w in LETTERS))
        task: Any = {"name": "text", "files": [str(text)]}
        if HEADS[kind] == "classification":
            task = {"name": "grammaticality", "train_examples": 16}
        one = recipe(
            kind, task=task, method=sample_part("method", method), objective=HEADS[kind], **changes
        )
        return one, build(one)

    return made


def batch_of(built: Built, rows: int = 4) -> Any:
    return built.collator(built.train_rows[:rows])


def loss_of(recipe: Any, built: Built, batch: Any) -> torch.Tensor:
    return recipe.objective.loss(built.learner, batch) / recipe.objective.targets(batch)


def train(recipe: Any, built: Built, steps: int) -> list[float]:
    batch, losses = batch_of(built), []
    for group in built.optimizer.param_groups:
        group["lr"] = 1e-2
    built.model.train()
    for _ in range(steps):
        loss = loss_of(recipe, built, batch)
        loss.backward()
        built.optimizer.step()
        built.optimizer.zero_grad()
        losses.append(float(loss))
    built.model.eval()
    return losses


def logits(built: Built) -> torch.Tensor:
    with torch.no_grad():
        return built.learner.logits(batch_of(built))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_where_there_is_a_place_for_it(
    method: str, recipe: Callable[..., Any]
) -> None:
    """Behaviour: on every kind with both heads, but for what is declared, with its reason."""
    for kind, objective in itertools.product(KINDS, ("classification", "label_words")):
        one = recipe(kind, method=sample_part("method", method), objective=objective)
        if why := no_place(method, kind, objective):
            with pytest.raises(InputError, match=why):
                build(one)
            continue
        tied = [id(p) for p in build(one).model.parameters() if p.requires_grad]
        assert tied and len(tied) == len(set(tied))


@each
def test_the_model_is_unchanged_before_the_first_update(method: str, kind: str, make: Any) -> None:
    """Reference: the plain model. Equal bit for bit: an adapter adds exact zeros."""
    one, built = make(kind, method)
    if not one.method.starts_as_base:
        pytest.skip("the method declares that it starts elsewhere")
    _, plain = make(kind, "full")
    assert torch.equal(logits(built), logits(plain))


@each
def test_what_is_frozen_is_bit_identical_after_training(method: str, kind: str, make: Any) -> None:
    """Behaviour: only parameters that require gradients move."""
    recipe, built = make(kind, method)
    before = {n: p.detach().clone() for n, p in built.model.named_parameters()}
    train(recipe, built, 3)
    for name, parameter in built.model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name


@each
def test_every_trained_parameter_gets_a_gradient_and_moves(
    method: str, kind: str, make: Any
) -> None:
    """Behaviour, after two updates: LoRA's A has a zero gradient while B is still zero."""
    recipe, built = make(kind, method)
    before = {n: p.detach().clone() for n, p in built.model.named_parameters() if p.requires_grad}
    train(recipe, built, 2)
    loss_of(recipe, built, batch_of(built)).backward()
    for name, parameter in built.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            assert not torch.equal(parameter, before[name]), name


@each
def test_twenty_steps_on_one_batch_lower_its_loss(method: str, kind: str, make: Any) -> None:
    """Behaviour."""
    recipe, built = make(kind, method)
    losses = train(recipe, built, 20)
    assert losses[-1] < losses[0]


@each
def test_the_optimizer_holds_exactly_what_is_trained(method: str, kind: str, make: Any) -> None:
    """Behaviour: nothing trained is left out and nothing frozen is carried."""
    _, built = make(kind, method)
    held = {id(p) for g in built.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in built.model.parameters() if p.requires_grad}


@each
def test_a_saved_result_loads_and_gives_equal_logits(
    method: str, kind: str, make: Any, tmp_path: Path
) -> None:
    """Reference: the trained model in memory. Equal bit for bit: float32 is stored as it is."""
    from lowres.bridges import peft_tuner, transformers

    recipe, built = make(kind, method)
    train(recipe, built, 3)
    folder = tmp_path / "saved"
    transformers.save(built.model, built.tokenizer, folder)
    assert not list(folder.glob("*.bin")), "safetensors only"
    _, fresh = make(kind, "full")
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        assert peft_tuner.PREFIX
        loaded: Any = PeftModel.from_pretrained(fresh.model, folder)
    else:
        loaded = type(fresh.model).from_pretrained(folder)
    loaded.eval()
    fresh.learner.module = fresh.learner.base = loaded
    assert torch.equal(logits(fresh), logits(built))


@each
def test_what_is_saved_is_what_loading_looks_for(
    method: str, kind: str, make: Any, tmp_path: Path
) -> None:
    """Behaviour: the check of the saved files passes (unless the method says that it saves another
    form), and lowres loads the adapter, which refuses a file with other names than PEFT's."""
    from lowres.bridges import peft, transformers

    recipe, built = make(kind, method)
    train(recipe, built, 2)
    transformers.save(built.model, built.tokenizer, tmp_path / "saved")
    if "saved" not in recipe.method.waives:
        stop_at_lost(built.model, tmp_path / "saved")
    if (tmp_path / "saved" / "adapter_config.json").exists():
        _, fresh = make(kind, "full")
        loaded = peft.load_adapter(fresh.model, tmp_path / "saved").eval()
        fresh.learner.module = fresh.learner.base = loaded
        assert torch.equal(logits(fresh), logits(built))


@each
def test_an_adapter_switches_off_and_lives_beside_a_second_one(
    method: str, kind: str, make: Any
) -> None:
    """Reference: the plain model when switched off; the first adapter when switched back."""
    recipe, built = make(kind, method)
    if not hasattr(built.model, "peft_config"):
        pytest.skip("trains the model in place: there is no adapter to switch off")
    model: Any = built.model
    with model.disable_adapter():
        plain = logits(built)
    train(recipe, built, 3)
    trained = logits(built)
    assert not torch.equal(trained, plain)
    with model.disable_adapter():
        assert torch.equal(logits(built), plain)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")
    second = logits(built)
    assert not torch.equal(second, trained)
    if recipe.method.starts_as_base:
        assert torch.allclose(second, plain, atol=1e-6)
    model.set_adapter("default")
    assert torch.equal(logits(built), trained)


@each
def test_merged_equals_unmerged(method: str, kind: str, make: Any) -> None:
    """Reference: unmerged logits. Tolerance: float32 rounding of W + BA against Wx + BAx."""
    recipe, built = make(kind, method)
    if not recipe.method.mergeable:
        pytest.skip("the method declares that it cannot be merged")
    train(recipe, built, 3)
    before = logits(built)
    built.learner.module = built.learner.base = recipe.method.merge(built.model)
    assert torch.allclose(logits(built), before, atol=1e-5)
    assert "peft_config" not in vars(built.learner.base)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        p
        for p in sampled(METHODS, ("decoder", "encoder_decoder"), every=2)
        if works(*map(str, p.values))
    ],
)
def test_generating_equals_the_forward_pass(method: str, kind: str, make: Any) -> None:
    """Reference: argmax of the forward pass, token by token;
    generate takes another path through PEFT.
    """
    recipe, built = make(kind, method)
    train(recipe, built, 3)
    row = built.train_rows[0]
    ids = torch.tensor([list(row.inputs["input_ids"])[:8]])
    model: Any = built.model
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4,
        do_sample=False,
    )  # fmt: skip
    two_sided = kind == "encoder_decoder"
    # What is written follows the row itself, or the token that an encoder's answer begins with.
    written = torch.tensor([[model.config.decoder_start_token_id]]) if two_sided else ids
    for _ in range(4):
        seen = (
            {"input_ids": ids, "decoder_input_ids": written}
            if two_sided
            else {"input_ids": written}
        )
        with torch.no_grad():
            scores = model(**seen, attention_mask=torch.ones_like(seen["input_ids"])).logits[:, -1]
        scores[:, model.config.eos_token_id] = float("-inf")
        written = torch.cat([written, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, written)
