"""What every lever promises, without naming one: `exact` changes no loss and no gradient, `lossy`
holds matrices within the tolerance that it declares, and computes with them and nothing else.
"""

from __future__ import annotations

import contextlib
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

from lowres.bridges.transformers import loading_in_this_thread
from lowres.bridges.unpacking import unpacked
from lowres.core import registry
from lowres.core.errors import InputError
from lowres.making.build import build
from lowres.memory.live import LiveBytes
from tests.conftest import GATED, KINDS, no_place, sample_part, sampled
from tests.updates import SMOOTH, compare, one_vector, two_updates

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


@pytest.fixture(scope="session")
def on_kind(recipe: Callable[..., Any]) -> Callable[..., str]:
    """The kind of checkpoint: another decoder where OPT lacks what one of the levers works on."""

    @functools.cache
    def gated(lever: str) -> bool:
        try:
            build(recipe(levers=[sample_part("lever", lever)], method="lora"))
        except InputError as refusal:
            return "no modules that are a feed-forward part by themselves" in str(refusal)
        return False

    return lambda kind, *levers: GATED if kind == "decoder" and any(map(gated, levers)) else kind


# What an exact lever refuses by what it is, and words of the reason; None stands for each. What a
# method cannot do beside a lever its class says (`refuses`). All else is to be compared.
REFUSED: dict[tuple[str, str | None, str | None], str] = {
    # Both work on answers token by token, and an encoder writes none.
    ("chunked_logits", None, "encoder"): "works on decoder, encoder_decoder",
    ("sequence_packing", None, "encoder"): "works on decoder, encoder_decoder",
    # The encoder of such a model sees the rows beside its own.
    ("sequence_packing", None, "encoder_decoder"): "it needs a decoder",
    # A block of T5 hands the bias of its attention on to those above.
    ("frozen_prefix_cache", None, "encoder_decoder"): "hands on more than hidden states",
    # All of the model trains: no weight is frozen.
    ("frozen_offload", "full", None): "leaves no frozen weights",
}


# What is refused else, and works: all entries that are chosen lie in the decoder, and the encoder
# is frozen as a whole.
WORKS = {("frozen_prefix_cache", "fish_mask", "encoder_decoder")}


# Pairs that no kind of model takes, in either order, and words of the reason.
REFUSED_PAIRS: dict[frozenset[str], str] = {
    frozenset(("frozen_offload", "int8_weights")): "hold their weights a second time",
}


def reasons(method: str, kind: str, *levers: str, objective: str = "classification") -> list[str]:
    """Why levers with a method on a kind of model are refused, in words of each reason; empty:
    they work."""
    found = [text for (lever, m, k), text in REFUSED.items()
             if lever in levers and m in (None, method) and k in (None, kind)
             and (lever, method, kind) not in WORKS]  # fmt: skip
    found += filter(None, [no_place(method, kind, objective)])
    return found + by_class(method, *levers)


def by_class(method: str, *levers: str) -> list[str]:
    """What a method's class says that it refuses of levers and of what these need beside them."""
    parts = [registry.load("lever", lever) for lever in levers]
    parts += [
        registry.load(family, told["name"])
        for family, told in needs_of(*levers).items()
        if family != "loop"
    ]
    refuses = registry.load("method", method).refuses
    return [text for bar, text in refuses.items() if any(bar in part.brings for part in parts)]


@pytest.mark.parametrize(("lever", "method", "kind"), sampled(EXACT, METHODS, KINDS, every=37))
def test_an_exact_lever_changes_no_update(
    lever: str, method: str, kind: str, recipe: Callable[..., Any],
    stage: Callable[..., dict[str, Any]], on_kind: Callable[..., str], awake: dict[str, Path],
) -> None:  # fmt: skip
    """Reference: the same recipe without the lever; equal to float32 rounding. Refused is what is
    declared, and nothing else."""
    kind = on_kind(kind, lever)
    changes = {"method": sample_part("method", method), "optimizer": SMOOTH, **needs_of(lever)}
    changes["model"] = {"checkpoint": str(awake[kind])}
    if registry.load("method", method).draws:
        changes["loop"] = changes["loop"] | {"micro_batch_size": 8}
    changes |= stage(kind, [sample_part("lever", lever)])
    make = lambda levers: recipe(kind, levers=levers, **changes)
    head = changes.get("objective", {"name": "classification"})["name"]
    if why := reasons(method, kind, lever, objective=head):
        refused(lambda: make([sample_part("lever", lever)]), why)
    else:
        compare(make([]), make([sample_part("lever", lever)]))


def refused(make: Callable[[], Any], why: list[str]) -> None:
    """Before the second update is made, and for one of these reasons."""
    with pytest.raises(InputError) as refusal:
        two_updates(make())
    assert any(text in str(refusal.value) for text in why), refusal.value


def test_each_exact_lever_is_compared_but_where_it_is_declared_to_be_refused() -> None:
    """Behaviour: nothing is skipped above, so the declarations say what was not compared. Nothing
    declared is of an unknown name, and each lever is compared with each method on some kind of
    model, but with those whose class refuses it and the one that is listed."""
    assert {lever for lever, _, _ in REFUSED} <= set(EXACT)
    assert {method for _, method, _ in REFUSED} <= {None, *METHODS}
    assert set().union(*REFUSED_PAIRS) <= set(HERE)
    for lever in EXACT:
        never = [m for m in METHODS if all(reasons(m, kind, lever) for kind in KINDS)]
        compared = sum(not reasons(m, kind, lever) for m in METHODS for kind in KINDS)
        declared = [m for m in METHODS if by_class(m, lever) or (lever, m, None) in REFUSED]
        assert never == declared
        kinds = [k for k in KINDS if (lever, None, k) not in REFUSED]
        lost = sum(no_place(m, k, "classification") is not None
                   for m in METHODS if m not in never for k in kinds)  # fmt: skip
        more = len([one for one in WORKS if one[0] == lever])
        assert compared == (len(METHODS) - len(never)) * len(kinds) - lost + more
        assert len(kinds) >= 1 and len(never) <= 2


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
    stage: Callable[..., dict[str, Any]], on_kind: Callable[..., str], awake: dict[str, Path],
) -> None:  # fmt: skip
    """Reference: the lossy one alone; equal to float32 rounding."""
    kind = on_kind(kind, exact)
    changes = {"method": sample_part("method", "lora"), "optimizer": SMOOTH}
    changes |= needs_of(lossy, exact) | stage(kind, [sample_part("lever", exact)])
    changes["model"] = {"checkpoint": str(awake[kind])}
    make = lambda levers: recipe(kind, levers=levers, **changes)
    first = sample_part("lever", lossy)
    why = reasons("lora", kind, exact, lossy)
    if pair := REFUSED_PAIRS.get(frozenset((exact, lossy))):
        why.append(pair)
    if why:
        refused(lambda: make([first, sample_part("lever", exact)]), why)
    else:
        compare(make([first]), make([first, sample_part("lever", exact)]))


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(EXACT, 2)))
def test_every_ordered_pair_of_exact_levers_is_exact(
    first: str, second: str, recipe: Callable[..., Any], stage: Callable[..., dict[str, Any]],
    on_kind: Callable[..., str], awake: dict[str, Path],
) -> None:  # fmt: skip
    """Reference: the recipe without either; equal to float32 rounding. On the first kind of model
    for which neither is declared to be refused; each pair has one, but for those that are listed,
    and these are refused on every kind."""
    pair = [sample_part("lever", n) for n in (first, second)]
    changes = {"method": sample_part("method", "lora"), "optimizer": SMOOTH}
    changes |= needs_of(first, second)

    def make(kind: str, levers: list[Any]) -> Any:
        there = on_kind(kind, first, second)
        model = {"checkpoint": str(awake[there])}
        return recipe(there, levers=levers, model=model, **changes | stage(there, pair))

    if why := REFUSED_PAIRS.get(frozenset((first, second))):
        for kind in KINDS:
            refused(
                functools.partial(make, kind, pair), [why, *reasons("lora", kind, first, second)]
            )
        return
    kind = next(kind for kind in KINDS if not reasons("lora", kind, first, second))
    compare(make(kind, []), make(kind, pair))


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
