"""Runs that would go wrong without a word are stopped, and those that go right are left alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowres
from lowres.bridges import accelerate
from lowres.core.engine import BackPropagation
from lowres.core.errors import Diverged
from lowres.run import guards
from lowres.run.build import build, engine_of
from lowres.run.checksums import checksum
from lowres.run.gradients import make_gradients, micro_batches
from lowres.run.guards import GuardFailed, Guards, stop_at_lost
from lowres.run.weights import remark_on_bfloat16
from tests.conftest import KINDS


def go(one: Any, folder: Path) -> Any:
    return lowres.run(one, output_folder=folder / "out", quiet=True, plan=False)


@pytest.fixture
def before_update(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """Have a function called with the engine before each update."""
    plain = BackPropagation.update

    def plant(spoil: Callable[[Any], None]) -> None:
        def update(self: Any, *arguments: Any) -> Any:
            spoil(self)
            return plain(self, *arguments)

        monkeypatch.setattr(BackPropagation, "update", update)

    return plant


def named(engine: Any, ending: str) -> Any:
    return next(p for n, p in engine.learner.base.named_parameters() if n.endswith(ending))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["full", "lora", "bitfit"])
def test_a_sound_run_passes_without_a_remark(
    method: str, kind: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: with a warm-up, whose first update has a learning rate of 0."""
    if (method, kind) == ("bitfit", "encoder_decoder"):
        kind = "decoder"  # T5 has no biases
    record = go(recipe(kind, method=method, loop={"warmup_ratio": 0.25}), tmp_path)
    assert record.outcome == "ok" and record.learning_rates[0] == 0
    assert not [e for e in record.events if e.kind == "moved"]


def test_a_parameter_without_a_gradient_stops_the_run(
    recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: one that the loss does not depend on, named; frozen it is let be."""
    from lowres.bridges import transformers

    load = transformers.load_model

    def with_a_stray(*arguments: Any) -> Any:
        model, fresh = load(*arguments)
        model.register_parameter("stray", nn.Parameter(torch.ones(3)))
        return model, fresh

    monkeypatch.setattr(transformers, "load_model", with_a_stray)
    with pytest.raises(GuardFailed, match="no gradient reaches stray"):
        go(recipe(method="full"), tmp_path)
    assert go(recipe(method="lora"), tmp_path / "frozen").outcome == "ok"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_named(
    value: float, recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: where no norm is computed that would show it."""
    plain = BackPropagation.accumulate

    def spoiled(self: Any, *arguments: Any, **more: Any) -> None:
        plain(self, *arguments, **more)
        named(self, "1.fc1.weight").grad.view(-1)[-1] = value

    monkeypatch.setattr(BackPropagation, "accumulate", spoiled)
    with pytest.raises(Diverged, match=r"gradients of \S*layers\.1\.fc1\.weight are not finite"):
        go(recipe(method="full", loop={"max_grad_norm": None}), tmp_path)


def test_a_parameter_that_does_not_move_stops_the_run(
    recipe: Callable[..., Any], tmp_path: Path, before_update: Any
) -> None:
    """Behaviour: its gradient is lost before the optimizer sees it (a stale copy would look so)."""
    before_update(lambda engine: setattr(named(engine, "1.fc1.weight"), "grad", None))
    with pytest.raises(GuardFailed, match=r"after 2 updates \S*layers\.1\.fc1\.weight of"):
        go(recipe(method="full"), tmp_path)


def test_a_dead_parameter_stops_the_run(
    recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: its gradient is there and always 0."""
    plain = BackPropagation.accumulate

    def spoiled(self: Any, *arguments: Any, **more: Any) -> None:
        plain(self, *arguments, **more)
        named(self, "1.fc1.weight").grad.zero_()

    monkeypatch.setattr(BackPropagation, "accumulate", spoiled)
    optimizer = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.0}
    with pytest.raises(GuardFailed, match=r"layers\.1\.fc1\.weight of"):
        go(recipe(method="full", optimizer=optimizer), tmp_path)


def test_a_parameter_that_the_optimizer_does_not_hold_stops_the_run(
    recipe: Callable[..., Any],
) -> None:
    """Behaviour: before the first update."""
    one = recipe(method="lora")
    built = build(one)
    built.optimizer.param_groups[0]["params"].pop()
    with pytest.raises(GuardFailed, match="the optimizer does not hold"):
        Guards(one, built.model, built.optimizer, print).begin()


def test_updates_below_the_resolution_are_remarked_on_and_no_failure(
    recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Closed form: weights of norms are 1, and 1 + 1e-5 is 1 in bfloat16; biases of 0 move."""
    one = recipe(
        method="full", model={"dtype": "bfloat16"},
        optimizer={"name": "adamw", "lr": 1e-5, "weight_decay": 0.0},
    )  # fmt: skip
    record = go(one, tmp_path)
    (remark,) = [e.text for e in record.events if e.kind == "moved"]
    assert record.outcome == "ok" and "layer_norm.weight" in remark


def test_a_run_in_which_nothing_moves_stops(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Closed form: a rate below the resolution of everything that is trained."""
    optimizer = {"name": "adamw", "lr": 1e-30, "weight_decay": 0.0}
    one = recipe("encoder", method="full", optimizer=optimizer, model={"dtype": "bfloat16"})
    built = build(one)
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter.fill_(1.0)
    found: list[str] = []
    watch = Guards(one, built.model, built.optimizer, lambda kind, _: found.append(kind))
    watch.begin()
    for _ in range(guards.UPDATES - 1):
        watch.updated(skipped=False)
    watch.updated(skipped=True)
    assert watch.watching, "an update that was skipped does not count"
    with pytest.raises(GuardFailed, match="have not changed at all"):
        watch.updated(skipped=False)
    assert found == []


def test_a_frozen_parameter_that_changes_is_named(
    recipe: Callable[..., Any], tmp_path: Path, before_update: Any
) -> None:
    """Behaviour: by one element in each step of the sample; packed weights too."""

    def spoil(engine: Any) -> None:
        weight = named(engine, "1.fc1.weight") if not levers else named(engine, "fc1.weight")
        weight.data.view(torch.uint8 if levers else torch.int32).view(-1)[0] += 1

    before_update(spoil)
    for levers in ([], ["nf4_weights"]):
        with pytest.raises(GuardFailed, match=r"fc1\.weight should be frozen and changed"):
            go(recipe(method="lora", levers=levers), tmp_path / f"{len(levers)}")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_was_saved_otherwise_than_trained_is_named(
    method: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: one bit of one tensor, or a tensor of an adapter left out."""
    from lowres.bridges import transformers

    built = build(recipe(method=method))
    for parameter in built.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    transformers.save(built.model, built.tokenizer, tmp_path)
    stop_at_lost(built.model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    name = next(n for n in sorted(tensors) if "layers.1" in n)
    spoiled = tensors | {name: tensors[name].clone()}
    spoiled[name].view(-1)[-1] += 1e-3
    without = {n: t for n, t in tensors.items() if n != name}
    for wrong in (spoiled, without) if method == "lora" else (spoiled,):
        save_file(wrong, file, metadata={"format": "pt"})
        with pytest.raises(GuardFailed, match=r"layers\.1"):
            stop_at_lost(built.model, tmp_path)


def test_a_part_waives_what_cannot_hold_for_it(
    recipe: Callable[..., Any], tmp_path: Path, before_update: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: the same spoiled run, with a part that declares it."""
    one = recipe(method="full")
    before_update(lambda engine: setattr(named(engine, "1.fc1.weight"), "grad", None))
    monkeypatch.setattr(type(one.freezing), "waives", frozenset({"moved"}))
    assert go(one, tmp_path).outcome == "ok"


@pytest.mark.parametrize(("spoiled", "stops"), [("shift_oi", False), ("change_oi", True)])
def test_a_method_may_let_some_of_its_parameters_rest(
    spoiled: str, stops: bool, recipe: Callable[..., Any], tmp_path: Path, before_update: Any
) -> None:
    """Behaviour: those that it names; any other is still missed."""
    one = recipe(method={"name": "diff_pruning", "prune_at": 0.9})
    before_update(lambda engine: setattr(named(engine, f".{spoiled}"), "grad", None))
    if not stops:
        assert go(one, tmp_path).outcome == "ok"
        return
    with pytest.raises(GuardFailed, match=spoiled):
        go(one, tmp_path)


def test_what_moved_and_was_set_back_has_moved(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Behaviour: pruning before the second update sets most changes back to their start, and a rule
    without momentum leaves them there."""
    one = recipe(
        method="diff_pruning", loop={"steps": 2}, optimizer={"name": "adafactor", "lr": 1e-3}
    )
    assert go(one, tmp_path).outcome == "ok"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
def test_the_checksum_sees_any_bit_and_copies_nothing(dtype: torch.dtype) -> None:
    """Closed form: by hand over the bits; a transposed tensor has the same sum as itself."""
    torch.manual_seed(0)
    tensor = (torch.randn(64, 48) * 100).to(dtype)
    whole = checksum(tensor)
    assert whole == checksum(tensor.t()) == checksum(tensor.clone())
    if dtype == torch.uint8:
        assert whole == int(tensor.to(torch.int64).square().sum())
    other = tensor.clone()
    other[3, 5] = ~other[3, 5] if dtype == torch.bool else other[3, 5] + 1
    assert checksum(other) != whole
    pair = torch.tensor([0.75, 0.75])
    assert checksum(pair) != checksum(pair + torch.tensor([1e-6, -1e-6]))


def test_bfloat16_on_a_card_without_it_is_remarked_on(recipe: Callable[..., Any]) -> None:
    """Closed form: compute capability 8.0 is the first with bfloat16 units."""
    asks = recipe(loop={"precision": "bf16"})
    plain, types = recipe(), {"a": torch.float32}
    assert remark_on_bfloat16(asks, types, None) is None
    assert remark_on_bfloat16(asks, types, (8, 0)) is None
    assert remark_on_bfloat16(plain, types, (7, 5)) is None
    assert "loop.precision bf16" in str(remark_on_bfloat16(asks, types, (7, 5)))
    assert "bfloat16 weights" in str(remark_on_bfloat16(plain, {"a": torch.bfloat16}, (6, 1)))


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_any_split_of_an_update_gives_the_same_gradients(
    kind: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Reference: one micro-batch of 8 rows against 2 of 4, 4 of 2 and 8 of 1, with uneven numbers
    of targets, to float32 rounding. A mean of means is further off, which is shown, too."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join("The old king sees the dog. " * n for n in range(1, 9)))
    one = recipe(kind, task={"name": "text", "files": [str(text)]}, objective="next_token",
                 method="full", loop={"max_length": 64})  # fmt: skip
    built, objective = build(one), one.objective
    rows = sorted(built.train_rows, key=lambda row: row.length)[:8]
    found, targets = [], []
    for size in (8, 4, 2, 1):
        accelerator = accelerate.make(one)
        engine = engine_of(one, accelerator, built.learner, built.optimizer)
        batches = micro_batches(one, built.learner, rows, size)
        targets.append([objective.targets(batch) for batch in batches])
        assert len(batches) == 8 // size and sum(targets[-1]) == sum(targets[0])
        make_gradients(objective, built.learner, engine, accelerator, batches, 0)
        found.append(gradients_of(built.model))
        engine.discard()
    assert all(len(set(each)) > 1 for each in targets[1:])
    for other in found[1:]:
        assert float((other - found[0]).norm() / found[0].norm()) < 1e-5
    for row in rows:
        (batch,) = micro_batches(one, built.learner, [row], 1)
        (objective.loss(built.learner, batch) / objective.targets(batch) / 8).backward()
    wrong = gradients_of(built.model)
    assert float((wrong - found[0]).norm() / found[0].norm()) > 1e-2


def gradients_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
