"""Updates in the backward pass: bytes planned and measured, resuming, what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowres
from lowres.bridges import accelerate
from lowres.core.engine import BackPropagation
from lowres.core.errors import InputError, LowresError, OutOfMemory
from lowres.core.in_backward import UpdatesInBackward
from lowres.making import build
from lowres.making.gradients import make_gradients
from lowres.memory.held import held
from lowres.memory.live import LiveBytes
from tests.conftest import KINDS

LOOP = {"micro_batch_size": 8, "max_grad_norm": None}
LEVER = [{"name": "optimizer_in_backward"}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_planned_bytes_are_measured_bytes(
    optimizer: str, kind: str, recipe: Callable[..., Any], in_folder: Path
) -> None:
    """Reference: real runs on the CPU, to the byte, and losses of the run without the lever."""
    changes = {"loop": LOOP, "optimizer": {"name": optimizer, "lr": 1e-3}}
    plain = lowres.run(recipe(kind, **changes), quiet=True)
    record = lowres.run(recipe(kind, levers=LEVER, **changes), quiet=True)
    assert record.losses == pytest.approx(plain.losses, rel=1e-5)
    assert record.plan is not None, record.events
    for phase in ("first_step", "steady_steps", "evaluate"):
        planned = record.plan["phases"][phase]["live_bytes"]
        assert planned == record.measured.phases[phase].live_bytes, phase  # type: ignore[index]


def prepared(one: Any) -> Any:
    accelerator = accelerate.make(one)
    built = build.build(one)
    module, optimizer = accelerator.prepare(built.model, built.optimizer)
    learner = dataclasses.replace(built.learner, module=module)
    engine = build.engine_of(one, accelerator, learner, optimizer)
    learner.base.train()
    return built, learner, engine, accelerator


def gradients_alive(trained: list[torch.Tensor]) -> list[int]:
    """Filled in the backward pass: bytes of all gradients whenever another one is made."""
    seen: list[int] = []
    for parameter in trained:
        parameter.register_hook(
            lambda _: seen.append(sum(p.grad.nbytes for p in trained if p.grad is not None))
        )
    return seen


def test_gradients_never_exist_together(recipe: Callable[..., Any]) -> None:
    """Closed form: when the last gradient is made, all others are gone; without the lever the peak
    of a backward pass holds their sum."""
    peaks, summed = [], 0
    for levers in ([], LEVER):
        # One row, so that the peak is where gradients are and not where activations are.
        one = recipe(levers=levers, loop=LOOP | {"micro_batch_size": 1, "global_batch_size": 1})
        built, learner, engine, accelerator = prepared(one)
        trained = [p for p in learner.base.parameters() if p.requires_grad]
        most = gradients_alive(trained)
        batches = [built.collator(built.train_rows[:1])]
        for _ in range(2):
            engine.begin(1.0)
            make_gradients(one.objective, learner, engine, accelerator, batches, 0)
            engine.update(1.0, None)
        with LiveBytes("cpu", held(learner.base, engine.optimizer)) as counted:
            engine.begin(1.0)
            make_gradients(one.objective, learner, engine, accelerator, batches, 0)
            engine.update(1.0, None)
        peaks.append(counted.peak_bytes)
        if levers:
            assert max(most) == 0
            assert all(p.grad is None for p in trained)
        else:
            summed = sum(p.nbytes for p in trained)
            assert max(most) > summed / 3
    # The largest gradient, of the embedding table, is there in both.
    assert peaks[1] < peaks[0] - summed / 3


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_resumed_run_is_the_uninterrupted_one(
    optimizer: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Reference: the uninterrupted run, bit for bit, with a learning rate that changes."""
    make = lambda **budget: recipe(
        levers=LEVER, optimizer={"name": optimizer, "lr": 1e-3}, budget=budget,
        loop=LOOP | {"warmup_ratio": 0.5, "save_every": 2},
    )  # fmt: skip
    whole = lowres.run(make(), output_folder=tmp_path / "a", quiet=True, plan=False)
    with pytest.raises(LowresError):
        lowres.run(make(minutes=1e-6), output_folder=tmp_path / "b", quiet=True, plan=False)
    again = lowres.run(
        make(), output_folder=tmp_path / "b", resume="latest", quiet=True, plan=False
    )
    assert again.losses == whole.losses
    assert again.learning_rates == whole.learning_rates
    assert len(set(whole.learning_rates)) > 2


def test_the_learning_rate_is_that_of_the_update(recipe: Callable[..., Any]) -> None:
    """Reference: the plain run under a schedule with warm-up; equal to float32 rounding."""
    loop = LOOP | {"warmup_ratio": 0.5, "schedule": "cosine"}
    ends = []
    for levers in ([], LEVER):
        one = recipe(levers=levers, loop=loop)
        built, learner, engine, accelerator = prepared(one)
        for factor in (0.0, 0.5, 1.0):
            batches = [built.collator(built.train_rows[:8])]
            engine.begin(factor)
            make_gradients(one.objective, learner, engine, accelerator, batches, 0)
            engine.update(factor, None)
        ends.append(dict(learner.base.named_parameters()))
    for name, value in ends[0].items():
        assert torch.allclose(ends[1][name], value, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loop": LOOP | {"micro_batch_size": 2}}, "accumulate 4 .*micro_batch_size to 8"),
        ({"loop": LOOP | {"max_grad_norm": 1.0}}, "set loop.max_grad_norm to null"),
        ({"loop": LOOP | {"precision": "fp16"}}, "set loop.precision to bf16 or no"),
    ],
)
def test_what_needs_all_gradients_is_refused(
    changes: dict[str, Any], said: str, recipe: Callable[..., Any]
) -> None:
    """Behaviour: value, reason and the nearest choice that works."""
    with pytest.raises(InputError, match=said):
        recipe(levers=LEVER, **changes)


def test_several_processes_are_refused(recipe: Callable[..., Any]) -> None:
    """Behaviour: the number of processes is known when the engine is made."""
    _, _, engine, _ = prepared(recipe(loop=LOOP))

    class Two:
        num_processes = 2

    engine.accelerator = Two()
    with pytest.raises(InputError, match="2 processes; run one process"):
        UpdatesInBackward(engine, "optimizer_in_backward")


def test_an_update_that_ran_out_of_memory_is_not_repeated(
    recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: parameters may have moved already; the run ends and says what to lower."""
    from torch._subclasses.fake_tensor import FakeTensor

    plain = BackPropagation.accumulate

    def failing(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if not isinstance(args[0], FakeTensor):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(BackPropagation, "accumulate", failing)
    with pytest.raises(OutOfMemory, match="cannot be repeated"):
        lowres.run(
            recipe(levers=LEVER, loop=LOOP), output_folder=tmp_path / "a", quiet=True, plan=False
        )


def test_an_update_with_other_values_than_announced_is_an_error(recipe: Callable[..., Any]) -> None:
    """Behaviour: no update is quietly made with another learning rate, or left unclipped."""
    _, _, engine, _ = prepared(recipe(levers=LEVER, loop=LOOP))
    engine.begin(0.5)
    for lr, norm in ((1.0, None), (0.5, 1.0)):
        with pytest.raises(LowresError, match="made this update in the backward pass"):
            engine.update(lr, norm)
    with pytest.raises(LowresError, match="several micro-batches"):
        engine.accumulate(torch.zeros(()), 1.0, last=False)
