"""What every lever promises, without naming one: `exact` changes no loss and no gradient, `lossy`
holds matrices within the tolerance that it declares, and computes with them and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowres.bridges import accelerate
from lowres.bridges.transformers import loading_in_this_thread
from lowres.bridges.unpacking import unpacked
from lowres.core import registry
from lowres.core.errors import InputError
from lowres.memory.live import LiveBytes
from lowres.run.build import build, engine_of
from lowres.run.gradients import make_gradients, micro_batches
from lowres.run.held import held
from tests.conftest import KINDS, sample_part, sampled

LEVERS = registry.names("lever")
METHODS = registry.names("method")
# What changes the process for good is compared in processes of its own (tests/equivalence) and by
# the compatibility table.
HERE = [n for n in LEVERS if not registry.load("lever", n).whole_process]
EXACT = [n for n in HERE if registry.load("lever", n).effect == "exact"]
LOSSY = [n for n in HERE if n not in EXACT]


def test_there_are_levers() -> None:
    """Behaviour: the listing is not empty, each says whether it is exact, and how lossy."""
    assert LEVERS
    assert all(registry.load("lever", n).effect in ("exact", "lossy") for n in LEVERS)
    assert all(0 < registry.load("lever", n).tolerance < 1 for n in LOSSY)


def gradients(one: Any) -> dict[str, torch.Tensor]:
    """Of one forward and backward pass in training mode."""
    built = build(one)
    built.model.train()
    torch.manual_seed(0)  # of gates that are drawn
    one.objective.loss(built.learner, built.collator(built.train_rows[:8])).backward()
    return {n: p.grad for n, p in built.model.named_parameters() if p.grad is not None}


def two_updates(one: Any) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Losses, what is trained, and the peak of live bytes of the second of two real updates, each
    of two micro-batches."""
    accelerator = accelerate.make(one)
    built = build(one)
    module, optimizer = accelerator.prepare(built.model, built.optimizer)
    learner = dataclasses.replace(built.learner, module=module)
    engine = engine_of(one, accelerator, learner, optimizer)
    learner.base.train()
    losses = []
    for step in range(2):
        rows = built.train_rows[8 * step : 8 * step + 8]
        batches = micro_batches(one, learner, rows, one.loop.micro_batch_size)
        with LiveBytes("cpu", held(learner.base, engine.optimizer)) as counted:
            loss, _, _ = make_gradients(one.objective, learner, engine, accelerator, batches, 0)
            engine.update(1.0, one.loop.max_grad_norm)
        losses.append(loss)
    trained = {n: p.detach() for n, p in learner.base.named_parameters() if p.requires_grad}
    return losses, trained, counted.peak_bytes


@pytest.fixture(scope="session")
def stage(
    recipe: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """What of a recipe to change so that its levers have something to do: a lever that refuses to
    classify is tried on answers of many lengths."""
    folder = tmp_path_factory.mktemp("gsm8k")
    for split in ("train", "test"):
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as table:
            for i in range(16):
                question = " ".join(["two", "and", "three"][: 1 + i % 3] * (1 + i % 4))
                answer = f"{'so ' * (i % 5)}it is {i} #### {i}"
                table.write(json.dumps({"question": question, "answer": answer}) + "\n")
    answers = {
        "task": {"name": "gsm8k", "folder": str(folder)},
        "objective": {"name": "next_token", "max_new_tokens": 8},
    }

    def choose(kind: str, levers: list[Any]) -> dict[str, Any]:
        try:
            recipe(kind, levers=levers, method="lora")
        except InputError as refusal:
            if any("objective" in p.text or "asks" in p.text for p in refusal.problems):
                return answers
        return {}

    return choose


# With a large eps an update is nearly proportional to its gradient: AdamW's first ones are else
# signs, which rounding turns over.
SMOOTH = {"name": "adamw", "lr": 0.1, "eps": 1.0}


def compare(one: Any, other: Any) -> tuple[int, int]:
    """Two updates of each: equal losses and parameters. Returns both peaks."""
    losses, plain, peak = refused_or(lambda: two_updates(one))
    pulled_losses, pulled, pulled_peak = refused_or(lambda: two_updates(other))
    assert pulled_losses == pytest.approx(losses, rel=1e-5)
    assert pulled.keys() == plain.keys()
    for name, value in plain.items():
        assert torch.allclose(pulled[name], value, rtol=1e-5, atol=1e-6), name
    return peak, pulled_peak


@pytest.mark.parametrize(("lever", "method", "kind"), sampled(EXACT, METHODS, KINDS, every=37))
def test_an_exact_lever_changes_no_update(
    lever: str, method: str, kind: str, recipe: Callable[..., Any],
    stage: Callable[..., dict[str, Any]],
) -> None:  # fmt: skip
    """Reference: the same recipe without the lever; equal to float32 rounding."""
    changes = {"method": sample_part("method", method), "optimizer": SMOOTH, **needs_of(lever)}
    if registry.load("method", method).draws:
        changes["loop"] = changes["loop"] | {"micro_batch_size": 8}
    changes |= stage(kind, [sample_part("lever", lever)])
    make = lambda levers: refused_or(lambda: recipe(kind, levers=levers, **changes))
    compare(make([]), make([sample_part("lever", lever)]))


def needs_of(*levers: str) -> dict[str, Any]:
    """What the levers say that they need of the recipe."""
    needs: dict[str, Any] = {"loop": {}}
    for name in levers:
        told = registry.load("lever", name).sample_recipe
        needs |= {**told, "loop": needs["loop"] | told.get("loop", {})}
    return needs


def refused_or(make: Callable[[], Any]) -> Any:
    """What is made, or the end of the test with the reason of a refusal."""
    try:
        return make()
    except InputError as refusal:
        pytest.skip(f"refused: {refusal.problems[0].text}")


def one_vector(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([found[name].flatten() for name in sorted(found)])


def weights_as_held(base: nn.Module) -> dict[str, torch.Tensor]:
    """Float32 values of all parameters, by their names without what PEFT adds."""
    out = {}
    for path, layer in base.named_modules():
        plain = path.removeprefix("base_model.model.").replace(".base_layer", "")
        for name, parameter in layer.named_parameters(recurse=False):
            value = unpacked(layer) if name == "weight" else parameter.detach()
            out[f"{plain}.{name}"] = value.float()
    return out


@pytest.fixture(scope="session")
def as_held(
    recipe: Callable[..., Any], checkpoints: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], Path]:  # fmt: skip
    """Lever and kind to a float32 checkpoint of the weights as the lever holds them."""

    @functools.cache
    def make(lever: str, kind: str) -> Path:
        fields = {"levers": [sample_part("lever", lever)], "method": sample_part("method", "lora")}
        held = weights_as_held(build(recipe(kind, **fields)).learner.base)
        folder = tmp_path_factory.mktemp("held") / kind
        shutil.copytree(checkpoints[kind], folder)
        weights = load_file(folder / "model.safetensors")
        for name, value in weights.items():
            found = [n for n in held if n == name or n.endswith(f".{name}")]
            for match in found:  # none: a part of the checkpoint that the task has no use for
                weights[name] = held[match].reshape(value.shape).clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize(("lever", "kind"), list(itertools.product(LOSSY, KINDS)))
def test_a_lossy_lever_holds_matrices_within_its_tolerance(
    lever: str, kind: str, checkpoints: dict[str, Path], as_held: Callable[[str, str], Path]
) -> None:
    """Reference: the checkpoint. Most matrices are held otherwise, nothing else is."""
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (checkpoints[kind], as_held(lever, kind))
    )
    changed = 0
    for name, value in before.items():
        if torch.equal(after[name], value):
            continue
        changed += 1
        assert value.ndim == 2, name
        distance = float((after[name] - value).norm() / value.norm())
        assert distance < registry.load("lever", lever).tolerance, name
    assert changed >= sum(value.ndim == 2 for value in before.values()) / 2


@pytest.mark.parametrize(("lever", "method", "kind"), sampled(LOSSY, METHODS, KINDS, every=23))
def test_a_lossy_lever_computes_with_what_it_holds(
    lever: str, method: str, kind: str, recipe: Callable[..., Any],
    as_held: Callable[[str, str], Path],
) -> None:  # fmt: skip
    """Reference: the gradients of the recipe without the lever on a checkpoint of the weights as
    held; equal to the rounding of the narrowest type in which a number is held. Twice the same: an
    evaluation in between changes nothing."""
    changes = {"method": sample_part("method", method)}
    one = refused_or(lambda: recipe(kind, levers=[sample_part("lever", lever)], **changes))
    model = {"checkpoint": str(as_held(lever, kind))}
    plain = refused_or(lambda: gradients(recipe(kind, model=model, **changes)))
    built = build(one)
    frozen = {n: p.clone() for n, p in built.model.named_parameters() if not p.requires_grad}
    batch = built.collator(built.train_rows[:8])
    seen = []
    for _ in range(2):
        with torch.no_grad():
            one.objective.predict(built.learner, batch, one.task)
        built.model.train()
        torch.manual_seed(0)
        one.objective.loss(built.learner, batch).backward()
        trained = {n: p for n, p in built.model.named_parameters() if p.requires_grad}
        seen.append({n: p.grad for n, p in trained.items() if p.grad is not None})
        built.model.zero_grad()
        built.model.eval()
    ours, theirs = one_vector(seen[0]), one_vector(plain)
    assert torch.equal(ours, one_vector(seen[1]))
    floats = [p.dtype for p in built.model.parameters() if p.is_floating_point()]
    tolerance = max(1e-5, *(torch.finfo(dtype).eps for dtype in floats))
    assert seen[0].keys() == plain.keys()
    assert 0 < float(theirs.norm())
    assert float((ours - theirs).norm() / theirs.norm()) < tolerance
    for name, before in frozen.items():
        after = built.model.get_parameter(name)
        assert after.dtype == before.dtype and torch.equal(after, before), name


@pytest.mark.parametrize("lever", LOSSY)
def test_a_lossy_lever_works_with_a_method_on_every_kind(
    lever: str, recipe: Callable[..., Any]
) -> None:
    """Behaviour: a lever that refuses everything would pass the test above by skipping it."""
    for kind in KINDS:
        worked = 0
        levers = [sample_part("lever", lever)]
        for method in METHODS:
            with contextlib.suppress(InputError):
                changes = {"method": sample_part("method", method)}
                worked += bool(build(recipe(kind, levers=levers, **changes)))
            if worked:
                break
        assert worked, kind


@pytest.mark.parametrize(("lossy", "exact", "kind"), sampled(LOSSY, EXACT, KINDS, every=4))
def test_an_exact_lever_is_exact_beside_a_lossy_one(
    lossy: str, exact: str, kind: str, recipe: Callable[..., Any],
    stage: Callable[..., dict[str, Any]],
) -> None:  # fmt: skip
    """Reference: the lossy one alone; equal to float32 rounding."""
    changes = {"method": sample_part("method", "lora"), "optimizer": SMOOTH}
    changes |= needs_of(lossy, exact) | stage(kind, [sample_part("lever", exact)])
    make = lambda levers: refused_or(lambda: recipe(kind, levers=levers, **changes))
    first = sample_part("lever", lossy)
    compare(make([first]), make([first, sample_part("lever", exact)]))


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(EXACT, 2)))
def test_every_ordered_pair_of_exact_levers_is_exact(
    first: str, second: str, recipe: Callable[..., Any], stage: Callable[..., dict[str, Any]]
) -> None:
    """Reference: the recipe without either; equal to float32 rounding. On the first kind of model
    that both accept."""
    changes = {"method": sample_part("method", "lora"), "optimizer": SMOOTH}
    changes |= needs_of(first, second)
    pair = [sample_part("lever", n) for n in (first, second)]
    make = lambda kind, levers: refused_or(
        lambda: recipe(kind, levers=levers, **changes | stage(kind, pair))
    )
    for kind in KINDS:
        try:
            compare(make(kind, []), make(kind, pair))
        except pytest.skip.Exception:
            if kind == KINDS[-1]:
                raise
        else:
            break


@pytest.mark.parametrize(("lever", "method"), sampled(LOSSY, METHODS, every=13))
def test_a_lossy_lever_leaves_fewer_bytes_held(
    lever: str, method: str, recipe: Callable[..., Any]
) -> None:
    """Behaviour, with the embedded model: what is alive when all is built, scales included. The
    random models of the other tests are smaller than a lever's tables may be."""
    held = []

    def make(levers: list[Any]) -> Any:
        checkpoint = {"checkpoint": "package:lowres/assets/tiny_lm"}
        fields = sample_part("method", method)
        return recipe(model=checkpoint, levers=levers, method=fields, objective="label_words")

    for levers in ([], [sample_part("lever", lever)]):
        with loading_in_this_thread(), LiveBytes("cpu") as counted:
            built = refused_or(functools.partial(lambda levers: build(make(levers)), levers))
            held.append(counted.now_bytes)
        del built
    assert held[1] < held[0]
