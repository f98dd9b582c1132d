"""AdaLoRA's importances, cuts and penalty against PEFT's own, and what a checkpoint keeps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from safetensors.torch import load_file

import lowres
from lowres.core.errors import InputError
from lowres.core.learner import Learner
from lowres.core.reading import load_recipe
from lowres.methods._adalora import Schedule
from tests.methods.test_of_peft import IDS, LINEAR, adapt, llama, logits, method

STEPS = 10
RANKS = {"initial_rank": 3, "target_rank": 2}


def backward(model: Any) -> None:
    scores = model(IDS).logits
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), IDS.flatten()).backward()


def test_importances_and_cuts_are_those_of_peft() -> None:
    """Reference: PEFT's allocator, given the same gradients; the kept triplets are the same."""
    one = method("adalora", **RANKS)
    model = adapt(llama(), one)
    config = peft.AdaLoraConfig(init_r=3, target_r=2, total_step=100, tfinal=10)
    theirs = RankAllocator(model.base_model.model, config, "default")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for step in range(4):
        backward(model)
        theirs.update_ipt(model.base_model.model)
        one.after_gradients(model, step, 100)
        optimizer.step()
        optimizer.zero_grad()
    for ours_, theirs_ in (
        ("_sensitivity", theirs.exp_avg_ipt), ("_uncertainty", theirs.exp_avg_unc),
    ):  # fmt: skip
        held = getattr(model.base_model.rankallocator, ours_)
        assert {f"{n}.default" for n in held} == theirs_.keys()
        for name, value in held.items():
            torch.testing.assert_close(value, theirs_[f"{name}.default"], atol=1e-9, rtol=1e-5)
    budget = 2 * theirs.init_bgt // 3
    values = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_E" in n}
    model.base_model.rankallocator.cut(model, budget, last=False)
    ours = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_E" in n}
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.data.copy_(values[name])
    theirs.mask_to_budget(model.base_model.model, budget)
    there = {n: p.detach() for n, p in model.named_parameters() if "lora_E" in n}
    assert ours.keys() == there.keys()
    assert all(torch.equal(ours[n], there[n]) for n in ours)
    assert sum(int((e != 0).sum()) for e in ours.values()) == budget


def test_the_penalty_is_what_peft_adds_to_the_loss() -> None:
    """Reference: the loss of PEFT's forward pass with labels, less that of the model inside.
    Tolerance: float32 rounding of the difference of two losses.
    """
    one = method("adalora", penalty_weight=0.5)
    model = adapt(llama(), one)
    added = model.base_model(IDS, labels=IDS).loss - model.get_base_model()(IDS, labels=IDS).loss
    torch.testing.assert_close(one.penalty(model), added, atol=1e-5, rtol=1e-5)
    assert method("adalora", penalty_weight=0).penalty(model) is None


def test_the_budget_falls_with_the_cube_of_what_is_left() -> None:
    """Closed form: equation 13 of the paper."""
    plan = Schedule(120, 80, warm_up=0.1, final=0.5, every=2)
    budgets = [plan.budget(made, 100) for made in range(101)]
    assert plan.end(100) == 50 and budgets[50] == 80
    assert all(b is None for b in budgets[:11]) and all(b is None for b in budgets[51:])
    assert budgets[30] == int(80 + 40 * 0.5**3) and budgets[31] is None
    cuts = [b for b in budgets if b is not None]
    assert cuts == sorted(cuts, reverse=True) and max(cuts) < 120
    # However short a run is, it ends at the target.
    for total in range(1, 9):
        assert plan.budget(plan.end(total), total) == 80


@pytest.fixture(scope="module")
def keys(raw_recipe: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return raw_recipe(
        method={"name": "adalora", **RANKS},
        objective="label_words",
        optimizer={"name": "adamw", "lr": 1e-2},
        loop={"steps": STEPS, "save_every": 2, "keep_checkpoints": 9},
        task={"name": "grammaticality", "train_examples": 32, "evaluate": []},
    )


def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_does(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    """Reference: the run without a break; cut off before the last cut and after it. The saved
    adapter beside the plain model gives the trained model's logits.
    """
    seen: list[torch.Tensor] = []
    ids = torch.arange(8)[None] + 5

    def look(learner: Learner) -> None:
        with torch.no_grad():
            base: Any = learner.base
            seen.append(base(input_ids=ids).logits)

    recipe = load_recipe(keys)
    whole = tmp_path / "whole"
    lowres.run(recipe, output_folder=whole, quiet=True, look=look, plan=False)
    file = Path("model") / "adapter_model.safetensors"
    expected = load_file(whole / file)
    kept = [v.shape[0] for k, v in expected.items() if k.endswith("lora_E")]
    assert sum(kept) == 2 * len(kept)
    for at in (4, 8):
        cut = tmp_path / f"cut{at}"
        shutil.copytree(whole, cut)
        shutil.rmtree(cut / "model")
        for checkpoint in cut.glob("checkpoint-*"):
            if int(checkpoint.name.rpartition("-")[2]) > at:
                shutil.rmtree(checkpoint)
        lowres.run(recipe, output_folder=cut, resume="latest", quiet=True, plan=False)
        found = load_file(cut / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) for k in expected)
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(keys["model"]["checkpoint"])
    loaded: Any = peft.PeftModel.from_pretrained(plain, whole / "model").eval()
    with torch.no_grad():
        again = loaded(input_ids=ids).logits
    torch.testing.assert_close(again, seen[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": {"name": "adalora", "target_rank": 12}}, "set initial_rank to 18"),
        ({"method": {"name": "adalora", "final": 0.95}}, "leave no update to cut in"),
        ({"loop": {"precision": "fp16"}}, "changes the gradients' scale"),
        ({"levers": ["optimizer_in_backward"]}, "gradients would be gone"),
        ({"freezing": {"name": "lisa"}}, "budget is shared"),
        ({"optimizer": {"name": "mezo", "lr": 1e-4}}, "none is made"),
    ],
)
def test_what_it_cannot_do_is_said_before_anything_is_loaded(
    changes: dict[str, Any], says: str, raw_recipe: Callable[..., dict[str, Any]]
) -> None:
    """Behaviour."""
    keys = raw_recipe(**({"method": "adalora"} | changes))
    with pytest.raises(InputError, match=says):
        load_recipe(keys)


def test_the_first_outputs_are_the_plain_models_and_every_layer_has_its_triplets() -> None:
    """Behaviour: also where another adapter is put beside it."""
    model = adapt(llama(), method("adalora", **RANKS))
    assert torch.equal(logits(model), logits(llama()))
    assert sum("lora_E" in n for n, _ in model.named_parameters()) == 2 * len(LINEAR)
