"""What every freezing promises, without naming one."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor

import lowres
from lowres.bridges.peft import unwrap_adapted
from lowres.core import registry
from lowres.core.errors import InputError
from lowres.core.rotation import Rotating
from lowres.core.scored import Scored
from lowres.making.build import build
from tests.conftest import KINDS, ROOT, sample_part, sampled

FREEZING = registry.names("freezing")
METHODS = registry.names("method")
TURNS = 3


def of_family(cls: type) -> list[str]:
    return [n for n in FREEZING if issubclass(registry.load("freezing", n), cls)]


@pytest.fixture
def frozen_recipe(recipe: Callable[..., Any]) -> Callable[..., Any]:
    """A recipe with a freezing, and the first objective that goes with it."""

    def make(kind: str, freezing: str, method: str, **changes: Any) -> Any:
        said = ""
        for objective in ("classification", "label_words"):
            try:
                return recipe(
                    kind,
                    freezing=sample_part("freezing", freezing),
                    method=sample_part("method", method),
                    objective=objective,
                    **changes,
                )
            except InputError as refusal:
                said = refusal.problems[0].text
        if f"beside '{freezing}'" in said:
            pytest.skip(f"refused: {said}")
        raise AssertionError(f"no objective goes with it: {said}")

    return make


def turns(built: Any, one: Any) -> Iterator[int]:
    """The updates at which other blocks come in, set up one after the other."""
    freezing = one.freezing
    steps = range(0, TURNS * freezing.period, freezing.period) if rotates(one) else [0]
    for step in steps:
        built.rotation.turn(built.optimizer, step)
        yield step


def rotates(one: Any) -> bool:
    return isinstance(one.freezing, Rotating)


def training(built: Any) -> set[str]:
    """Names, without those that adapters put in front, of what takes part now."""
    return {plain(built, n) for n, p in built.model.named_parameters() if p.requires_grad}


def plain(built: Any, path: str) -> str:
    """Without what adapters put in front."""
    inside = unwrap_adapted(built.model)
    (prefix,) = (p for p, m in built.model.named_modules() if m is inside)
    return path.removeprefix(prefix + ".") if prefix else path


def lowest_of(built: Any) -> int:
    names = built.learner.blocks.names
    trained = [
        i for i, n in enumerate(names) if any(t.startswith(n + ".") for t in training(built))
    ]
    # What trains before the blocks alone sends backward through all of them.
    return min(trained, default=0)


def test_there_are_freezings() -> None:
    """Reference: the files of the folder."""
    files = (ROOT / "lowres" / "freezing").glob("[!_]*.py")
    assert FREEZING and FREEZING == sorted(file.stem for file in files)


def saved_bytes(built: Any, batch: Any, objective: Any) -> dict[str, int]:
    """Bytes that autograd keeps in each block and the stem during one forward pass."""
    learner, kept, here = built.learner, {}, []
    own = {p.untyped_storage().data_ptr() for p in built.model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own and here:
            kept[here[-1]] = kept.get(here[-1], 0) + tensor.nbytes
        return tensor

    handles = []
    places = [*learner.blocks.names, *learner.blocks.stem]
    for path, module in built.model.named_modules():
        name = plain(built, path)
        if name in places:
            handles.append(module.register_forward_pre_hook(lambda *_, p=name: here.append(p)))
            handles.append(module.register_forward_hook(lambda *_: (here.pop(), None)[1]))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        objective.loss(learner, batch)
    for handle in handles:
        handle.remove()
    return kept


@pytest.mark.parametrize(
    ("freezing", "method", "kind"), sampled(FREEZING, METHODS, KINDS[:2], every=19)
)
def test_nothing_is_kept_for_backward_below_the_lowest_trained_block(
    freezing: str, method: str, kind: str, frozen_recipe: Callable[..., Any]
) -> None:
    """Behaviour: no gradient and no saved tensor in the blocks and the stem below; in each turn."""
    one = frozen_recipe(kind, freezing, method)
    built = build(one)
    blocks = built.learner.blocks
    batch = built.collator(built.train_rows[:4])
    built.model.train()
    # What is not is put before the model's input.
    inside = {id(p) for p in unwrap_adapted(built.model).parameters()}
    for _ in turns(built, one):
        one.objective.loss(built.learner, batch).backward()
        for name, parameter in built.model.named_parameters():
            if id(parameter) in inside and not blocks.trains(
                plain(built, name).replace(".base_layer", "")
            ):
                assert parameter.grad is None, name
            if not parameter.requires_grad:
                assert parameter.grad is None, name
        lowest = lowest_of(built)
        kept = saved_bytes(built, batch, one.objective)
        before = any(p.requires_grad and id(p) not in inside for p in built.model.parameters())
        if not before and not any(t.startswith(blocks.stem) for t in training(built)):
            below = [*blocks.names[:lowest], *blocks.stem]
            assert [n for n in below if kept.get(n)] == []
        assert any(kept.get(n) for n in blocks.names[lowest:]), "the probe saw nothing at all"


@pytest.mark.parametrize("levers", [(), ("gradient_checkpointing",)], ids=["plain", "recomputed"])
@pytest.mark.parametrize("freezing", FREEZING)
def test_states_between_blocks_die_below_the_lowest_trained_one(
    freezing: str, levers: tuple[str, ...], frozen_recipe: Callable[..., Any]
) -> None:
    """Behaviour: also where blocks are recomputed, which would keep the input of each."""
    one = frozen_recipe("decoder", freezing, "lora", levers=list(levers))
    built = build(one)
    built.model.train()
    model = unwrap_adapted(built.model)
    blocks = [model.get_submodule(name) for name in built.learner.blocks.names]
    for _ in turns(built, one):
        left: dict[int, Any] = {}

        def leave(place: int, out: Any, left: dict[int, Any] = left) -> None:
            left[place] = weakref.ref(out[0] if isinstance(out, tuple) else out)

        handles = [b.register_forward_hook(lambda _, a, out, i=i: leave(i, out))
                   for i, b in enumerate(blocks)]  # fmt: skip
        loss = one.objective.loss(built.learner, built.collator(built.train_rows[:4]))
        gc.collect()
        alive = [place for place, ref in left.items() if ref() is not None]
        lowest = lowest_of(built)
        # The input of the lowest trained block is what it needs; nothing below is.
        assert [place for place in alive if place < lowest - 1] == []
        if lowest < len(blocks) - 1:
            assert alive, "the probe saw nothing at all"
        del loss
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("freezing", FREEZING)
def test_frozen_blocks_do_not_move(freezing: str, frozen_recipe: Callable[..., Any]) -> None:
    """Behaviour, with the method that would train everything it may; what rests holds no states."""
    one = frozen_recipe("encoder", freezing, "full")
    built = build(one)
    blocks = built.learner.blocks
    for _ in turns(built, one):
        before = {n: p.detach().clone() for n, p in built.model.named_parameters()}
        one.objective.loss(built.learner, built.collator(built.train_rows[:4])).backward()
        built.optimizer.step()
        moved = {n for n, p in built.model.named_parameters() if not torch.equal(p, before[n])}
        assert moved
        assert moved <= training(built)
        assert all(blocks.trains(n) for n in moved)
        own = {id(p): n for n, p in built.model.named_parameters()}
        assert {own[id(p)] for p in built.optimizer.state} <= training(built)


@pytest.mark.parametrize(
    ("freezing", "optimizer"),
    sampled(
        of_family(Rotating),
        [name for name in registry.names("optimizer") if not name.startswith("paged")],
        every=2,
    ),
)
def test_what_rests_does_not_move_with_any_optimizer(
    freezing: str, optimizer: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: one run in which a single period passes; only its blocks have moved."""
    fields = sample_part("freezing", freezing)
    keys: dict[str, Any] = {"lr": 1e-2}
    if optimizer in ("galore", "apollo"):
        keys["rank"] = 4
    one = recipe(
        method="full", freezing=fields, objective="label_words",
        optimizer={"name": optimizer, **keys},
        loop={"steps": fields["period"], "max_grad_norm": None, "global_batch_size": 4},
    )  # fmt: skip
    start = {n: p.detach().clone() for n, p in build(one).model.named_parameters()}
    lowres.run(one, output_folder=tmp_path / "out", quiet=True, plan=False)
    saved = load_file(tmp_path / "out" / "model" / "model.safetensors")
    names = build(one).learner.blocks.names
    active = one.freezing.active(names, 0)
    moved = {name for name in names
             if any(not torch.equal(v, start[n]) for n, v in saved.items()
                    if n.startswith(name + "."))}  # fmt: skip
    assert moved == active


@pytest.mark.parametrize(
    ("freezing", "method"),
    sampled([*of_family(Rotating), *of_family(Scored)], METHODS, every=47),
)
def test_a_run_that_died_goes_on_with_the_blocks_it_had(
    freezing: str, method: str, frozen_recipe: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Reference: the uninterrupted run, bit for bit, stopped inside a period and at its end. A
    choice by data is read from the checkpoint and not made again."""
    one = frozen_recipe("decoder", freezing, method, loop={"steps": 5, "save_every": 1,
                                                           "keep_checkpoints": 9})  # fmt: skip
    whole = lowres.run(one, output_folder=tmp_path / "whole", quiet=True, plan=False)
    cls = type(one.freezing)
    if isinstance(one.freezing, Scored):
        look = cls.scores

        def only_in_a_plan(self: Any, learner: Any, sample: Any) -> torch.Tensor:
            assert isinstance(next(learner.base.parameters()), FakeTensor), "it chose again"
            return look(self, learner, sample)

        monkeypatch.setattr(cls, "scores", only_in_a_plan)
    for stop in (2, 3):
        again = tmp_path / f"after-{stop}"
        again.mkdir()
        (tmp_path / "whole" / f"checkpoint-{stop}").rename(again / f"checkpoint-{stop}")
        resumed = lowres.run(one, resume=str(again / f"checkpoint-{stop}"), quiet=True, plan=False)
        assert resumed.losses == whole.losses
        ours, theirs = (
            {k: v for f in sorted((tmp_path / n / "model").glob("*.safetensors"))
             for k, v in load_file(f).items()} for n in (again.name, "whole")
        )  # fmt: skip
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize("freezing", FREEZING)
def test_a_plan_is_what_a_run_takes(
    freezing: str, frozen_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Reference: bytes measured in the run, by phase. A choice that only data makes is planned as
    the costliest one."""
    one = frozen_recipe("decoder", freezing, "full", loop={"steps": 3})
    record = lowres.run(one, output_folder=tmp_path / "out", quiet=True)
    raw = json.loads((tmp_path / "out" / "record.json").read_text())
    for phase in ("load", "first_step", "steady_steps", "save"):
        planned = raw["plan"]["phases"][phase]["live_bytes"]
        measured = record.measured.phases[phase].live_bytes
        if phase == "load" or not (isinstance(one.freezing, Scored) or rotates(one)):
            assert planned == measured, phase
        assert planned >= measured, phase
