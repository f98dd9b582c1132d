"""Runs that would go wrong without a word are stopped, and those that go right are left alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowres
from lowres.bridges import accelerate
from lowres.core.engine import BackPropagation
from lowres.core.errors import Diverged, GuardFailed
from lowres.making.build import build, engine_of
from lowres.making.gradients import make_gradients, micro_batches
from lowres.run import guards
from lowres.run.checksums import checksum, fingerprint
from lowres.run.guards import Guards
from lowres.run.remarks import remark_on_bfloat16
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


IN_BACKWARD = {
    "levers": {"levers": ["optimizer_in_backward"]},
    "lomo": {"optimizer": {"name": "lomo", "lr": 1e-2}},
}


@pytest.mark.parametrize("how", IN_BACKWARD)
def test_a_parameter_without_a_gradient_stops_updates_within_the_backward_pass(
    how: str, recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: one that the loss does not depend on, or whose gradient is always 0 or not finite,
    is named there too; the sound run passes, with a warm-up, without a remark."""
    from lowres.bridges import transformers

    loop = {"micro_batch_size": 8, "max_grad_norm": None, "warmup_ratio": 0.25}
    one = recipe(method="full", loop=loop, **IN_BACKWARD[how])
    record = go(one, tmp_path / "sound")
    assert record.outcome == "ok" and not [e for e in record.events if e.kind == "moved"]
    load = transformers.load_model

    def spoiled(value: float | None) -> Any:
        def loads(*arguments: Any) -> Any:
            model, fresh = load(*arguments)
            if value is None:
                model.register_parameter("stray", nn.Parameter(torch.ones(3)))
            else:
                weight = dict(model.named_parameters())["model.decoder.layers.1.fc1.weight"]
                weight.register_hook(lambda gradient: gradient.fill_(value))
            return model, fresh

        return loads

    for value, error, said in (
        (None, GuardFailed, "no gradient reaches stray:"),
        (0.0, GuardFailed, r"after 2 updates \S*layers\.1\.fc1\.weight of"),
        (math.inf, Diverged, r"gradients of \S*layers\.1\.fc1\.weight are not finite"),
    ):
        monkeypatch.setattr(transformers, "load_model", spoiled(value))
        with pytest.raises(error, match=said):
            go(one, tmp_path / str(value))


def test_the_hooks_of_the_guard_are_gone_after_its_updates(recipe: Callable[..., Any]) -> None:
    """Behaviour: a hook of each trained parameter while it looks, none afterwards."""
    one = recipe(method="full", loop={"micro_batch_size": 8, "max_grad_norm": None},
                 levers=["optimizer_in_backward"])  # fmt: skip
    built = build(one)
    engine = engine_of(one, accelerate.make(one), built.learner, built.optimizer)
    watch = Guards(one, built.model, built.optimizer, print, engine.keeps_gradients)
    watch.begin()
    hooks = lambda: {len(p._backward_hooks or ()) for p in built.model.parameters()}
    assert hooks() == {1}
    for _ in range(guards.UPDATES):
        batch = built.collator(built.train_rows[:8])
        engine.begin(1.0)
        engine.accumulate(one.objective.loss(built.learner, batch).sum(), 1.0, last=True)
        watch.gradients(None)
        watch.updated(skipped=False)
    assert hooks() == {0} and not watch.watching


def test_without_gradients_float32_that_does_not_move_stops_the_run(
    recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: one matrix is left out of what mezo perturbs and updates; in 16 bits, where
    rounding may be to blame, it is remarked on."""
    from lowres.optimizers import mezo

    plain = mezo._active
    skipped: list[nn.Parameter] = []
    monkeypatch.setattr(
        mezo, "_active", lambda group: (p for p in plain(group) if all(p is not s for s in skipped))
    )
    init = mezo.TwoPasses.__init__

    def spoiled(self: Any, accelerator: Any, learner: Any, *arguments: Any) -> None:
        init(self, accelerator, learner, *arguments)
        skipped.append(named(self, "1.fc1.weight"))

    make = lambda **changes: recipe(
        method="full", optimizer={"name": "mezo", "lr": 1e-3}, loop={"max_grad_norm": None},
        **changes,
    )  # fmt: skip
    assert go(make(), tmp_path / "sound").outcome == "ok"
    monkeypatch.setattr(mezo.TwoPasses, "__init__", spoiled)
    with pytest.raises(GuardFailed, match=r"after 2 updates \S*layers\.1\.fc1\.weight of"):
        go(make(), tmp_path / "float32")
    record = go(make(model={"dtype": "bfloat16"}), tmp_path / "bfloat16")
    (remark,) = [e.text for e in record.events if e.kind == "moved"]
    assert "layers.1.fc1.weight" in remark


class Scaler:
    """Stands in for float16's, which the CPU has not."""

    def get_scale(self) -> float:
        return 2.0**16


@pytest.mark.parametrize("spoiled", [True, False])
def test_a_dead_parameter_stops_a_run_with_a_loss_scaler(
    spoiled: bool, recipe: Callable[..., Any]
) -> None:
    """Closed form: a gradient of 1e-8 times the scale, at a rate of 1e-3, is lost beside weights of
    1 and no failure; one of 0 is. The first gradients overflow and are no failure either."""
    one = recipe("encoder", method="full", optimizer={"name": "adamw", "lr": 1e-3})
    built = build(one)
    events: list[str] = []
    watch = Guards(one, built.model, built.optimizer, lambda kind, _: events.append(kind))
    watch.begin()
    weight = next(p for n, p in built.model.named_parameters() if n.endswith("LayerNorm.weight"))
    for gradient in (math.inf, 1e-8 * Scaler().get_scale(), 1e-8 * Scaler().get_scale()):
        for parameter in built.model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        if spoiled:
            weight.grad = torch.zeros_like(weight)
        watch.gradients(Scaler())
        if math.isinf(gradient):
            watch.updated(skipped=True)
            continue
        with torch.no_grad():
            for parameter in built.model.parameters():
                if parameter is not weight:
                    parameter.add_(1.0)
        if spoiled and not watch._updates + 1 < guards.UPDATES:
            with pytest.raises(GuardFailed, match=r"LayerNorm\.weight of"):
                watch.updated(skipped=False)
        else:
            watch.updated(skipped=False)
    assert events == ([] if spoiled else ["moved"])


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


@pytest.mark.parametrize(
    ("lr", "dtype", "levers", "remarked"),
    [
        (1e-5, "bfloat16", [], True),
        (1e-5, "bfloat16", ["optimizer_in_backward"], True),
        (1e-5, "bfloat16", [{"name": "optimizer_offload", "float32_master": True}], False),
        (1e-2, "bfloat16", [], False),
        (1e-5, "float32", [], False),
    ],
    ids=["small", "small in backward", "with wider copies", "large", "float32"],
)
def test_updates_that_are_rounded_away_are_remarked_on(
    lr: float, dtype: str, levers: list[Any], remarked: bool, recipe: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Closed form: Adam moves by the rate, which is less than half of what bfloat16 resolves of a
    weight above 512 times the rate; weights here are normal with a deviation of 0.02. A warm-up is
    waited for."""
    one = recipe(
        method="full", model={"dtype": dtype}, levers=levers,
        optimizer={"name": "adamw", "lr": lr, "weight_decay": 0.0},
        loop={"warmup_ratio": 0.25, "max_grad_norm": None, "micro_batch_size": 8},
    )  # fmt: skip
    told = [e.text for e in go(one, tmp_path).events if e.kind == "rounding"]
    if not remarked:
        assert not told
        return
    ((share,),) = [re.findall(r"rate of 1e-05 left (\d+)% of the trained", text) for text in told]
    below = math.erf(512 * lr / 0.02 / math.sqrt(2))  # surely moved; from 256 times on it may be
    half = math.erf(256 * lr / 0.02 / math.sqrt(2))
    assert 1 - below - 0.02 < int(share) / 100 < 1 - half + 0.02


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
    assert found == ["rounding"]  # said of the first update


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


@pytest.mark.parametrize("element", [1, 12_345, -1])
def test_any_element_of_a_frozen_parameter_is_seen(
    element: int, recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: one of 99,999 elements, which a sample of 4096 has not: 24 apart from 0 on."""
    from lowres.bridges import transformers

    load, plain = transformers.load_model, BackPropagation.update

    def with_a_table(*arguments: Any) -> Any:
        model, fresh = load(*arguments)
        model.register_parameter("table", nn.Parameter(torch.ones(99_999)))
        return model, fresh

    def update(self: Any, *arguments: Any) -> Any:
        with torch.no_grad():
            self.learner.base.get_parameter("base_model.model.table")[element] += 1e-6
        return plain(self, *arguments)

    monkeypatch.setattr(transformers, "load_model", with_a_table)
    monkeypatch.setattr(BackPropagation, "update", update)
    with pytest.raises(GuardFailed, match="table should be frozen and changed"):
        go(recipe(method="lora"), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
@pytest.mark.parametrize("start", [0, 1])
def test_the_fingerprint_sees_any_bit(start: int, dtype: torch.dtype) -> None:
    """Closed form: any one of 20,003 elements, also of a part of a buffer that begins at no
    multiple of 8 bytes, with the same sums there; elements that are exchanged, where the sample has
    them."""
    torch.manual_seed(0)
    buffer = (torch.randn(20_003 + start) * 100).to(dtype)
    tensor = buffer[start:]
    was = fingerprint(tensor)
    assert was == fingerprint(tensor.clone())
    for place in (0, 1, 2, 7, 10_001, -2, -1):
        other = tensor.clone()
        other[place] = ~other[place] if dtype == torch.bool else other[place] + 1
        assert fingerprint(other) != was, place
    if dtype == torch.float32:
        other = tensor.clone()
        other[[1, 3]] = other[[3, 1]]
        assert fingerprint(other) == was, "of which the sample, four apart, has none"
        other[[0, 2]] = other[[2, 0]]
        assert fingerprint(other) != was


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


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_updates_that_a_loss_scaler_leaves_out_do_not_count(
    implementation: str,
    recipe: Callable[..., Any],
    before_update: Callable[[Callable[[Any], None]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behaviour: as with float16 on a card; accelerate does not see that a fused optimizer left
    one out. LoRA's A has no gradient before B has moved, which the guard would take for wrong."""
    make = accelerate.make

    def scaled(one: Any) -> Any:
        made = make(one)
        made.scaler = torch.amp.GradScaler("cpu")
        return made

    left = [2]

    def overflow(engine: Any) -> None:
        if left[0]:
            left[0] -= 1
            named(engine, "lora_B.default.weight").grad.fill_(math.inf)

    monkeypatch.setattr(accelerate, "make", scaled)
    before_update(overflow)
    optimizer = {"name": "adamw", "lr": 1e-3, "implementation": implementation}
    record = go(recipe("decoder", method="lora", optimizer=optimizer), tmp_path)
    assert record.outcome == "ok" and len(record.losses) == 4
    assert [e.step for e in record.events if e.kind == "skipped"] == [0, 1]
