"""Saved tensors in host memory: what moves, what it saves, and plans of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowres
from lowres.core import host
from lowres.levers._saved import Saved, Ticket
from lowres.making.build import build
from lowres.memory import device as devices
from lowres.memory.live import LiveBytes, tensors_of
from lowres.memory.translate import Target
from lowres.planning.assumed import inputs_for
from lowres.planning.plan import plan
from lowres.planning.rehearsal import rehearse
from tests.conftest import KINDS, sampled
from tests.planning.conftest import config_folder, planned_recipe
from tests.updates import SMOOTH, compare, peak_bytes

__all__ = ["config_folder", "planned_recipe"]

OFFLOAD = [{"name": "activation_offload"}]
BOTH = [{"name": "gradient_checkpointing"}, *OFFLOAD]


def saved(*fixed: torch.Tensor, smallest: int = 1) -> Saved:
    return Saved(fixed, torch.device("cpu"), smallest, None)


def test_a_tensor_comes_back_with_its_shape_strides_and_values() -> None:
    """Reference: the tensor itself; whole, transposed, expanded, and a part of a storage."""
    base = torch.randn(6, 8)
    hooks = saved()
    for tensor in (base, base.t(), base[:, None].expand(6, 5, 8), base[1:3, 2:7], base.view(48)):
        ticket = hooks.pack(tensor)
        assert isinstance(ticket, Ticket)
        back = hooks.unpack(ticket)
        assert torch.equal(back, tensor) and back.dtype == tensor.dtype
        assert back.untyped_storage()._cdata != base.untyped_storage()._cdata


def test_what_is_small_fixed_whole_numbers_or_on_the_host_stays() -> None:
    """Behaviour: the hooks hand back the tensor itself; views of a parameter too."""
    weight, ids, there = nn.Parameter(torch.randn(8, 8)), torch.arange(64), host.copy(torch.ones(9))
    hooks = saved(weight, smallest=32)
    for tensor in (weight, weight.t(), weight[2:], ids, ids > 3, torch.ones(7), there):
        assert hooks.pack(tensor) is tensor
    assert isinstance(hooks.pack(torch.ones(8)), Ticket)


def test_what_begins_where_a_parameter_was_moves() -> None:
    """Behaviour: of weights that are put away in the meantime the address is used again, by one of
    those that are made next."""
    reused = 0
    for _ in range(50):
        weight = torch.zeros(1000)
        address = weight.untyped_storage()._cdata
        hooks = saved(weight)
        del weight
        made = [torch.ones(1000) for _ in range(300)]
        reused += any(new.untyped_storage()._cdata == address for new in made)
        assert all(isinstance(hooks.pack(new), Ticket) for new in made)
    assert reused


def test_what_is_saved_twice_is_kept_once_unless_it_was_changed() -> None:
    """Closed form: bytes on the host of one tensor under three views, and of its next version."""
    with LiveBytes("cpu") as counted:
        hooks, tensor = saved(), torch.zeros(256)
        tickets = [hooks.pack(t) for t in (tensor, tensor.view(16, 16), tensor.view(16, 16).t())]
        assert counted.host_bytes == 1024
        tensor.add_(1)
        later = hooks.pack(tensor)
        assert counted.host_bytes == 2048
        del tensor
        assert counted.now_bytes == 0
        ours = hooks.unpack(tickets[0])
        assert counted.now_bytes == 1024, "and nothing was kept before it"
        assert torch.equal(ours, torch.zeros(256)) and torch.equal(
            hooks.unpack(later), torch.ones(256)
        )
        del ours
        assert counted.now_bytes == 1024, "two views still wait for it"
        del tickets, later
        assert (counted.now_bytes, counted.host_bytes) == (0, 0)


def test_storage_that_was_given_away_is_not_taken_for_what_it_held() -> None:
    """Behaviour: many tensors, one after the other, at the same address."""
    hooks, tickets = saved(), []
    for number in range(20):
        tensor = torch.full((64,), float(number))
        tickets.append(hooks.pack(tensor))
        del tensor
    values = [float(hooks.unpack(ticket)[0]) for ticket in reversed(tickets)]
    assert values == [float(n) for n in reversed(range(20))]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensors_leave_the_device(
    kind: str, recipe: Callable[..., Any], awake: dict[str, Path]
) -> None:
    """Reference: the recipe without it; equal updates, lower peaks, alone and with the blocks
    recomputed."""
    make = lambda levers: recipe(
        kind, levers=levers, method="lora", optimizer=SMOOTH, loop={"max_length": 32},
        model={"checkpoint": str(awake[kind])},
    )  # fmt: skip
    compare(make([]), make(OFFLOAD))
    assert peak_bytes(make(OFFLOAD)) < peak_bytes(make([]))
    compare(make(BOTH[:1]), make(BOTH))
    assert peak_bytes(make(BOTH)) <= peak_bytes(make(BOTH[:1]))


def test_nothing_of_a_forward_pass_stays_but_what_is_fixed(recipe: Callable[..., Any]) -> None:
    """Behaviour: after the forward pass of the model floating tensors of the blocks are on the host
    alone, and the backward pass leaves none there; an evaluation moves nothing."""
    built = build(recipe(levers=OFFLOAD, method="lora"))
    batch = built.collator(built.train_rows[:4])
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    built.model.train()
    with LiveBytes("cpu", tensors_of(built.model)) as counted:
        held_bytes = counted.now_bytes
        out = built.model(**inputs).logits
        hidden = 4 * inputs["input_ids"].shape[1] * 16 * 4
        assert counted.host_bytes > 3 * 4 * hidden
        assert counted.now_bytes - held_bytes < 2 * hidden
        out.sum().backward()
        del out
        assert counted.host_bytes == 0
        with torch.no_grad():
            built.model(**inputs)
        assert counted.host_peak_bytes > 0 and counted.host_bytes == 0


@pytest.mark.parametrize(("levers", "kind"), sampled([OFFLOAD, BOTH], KINDS, every=3))
def test_planned_bytes_are_measured_bytes(
    kind: str, levers: Any, recipe: Callable[..., Any], in_folder: Any
) -> None:
    """Reference: a real run; steps and evaluation to the byte."""
    record = lowres.run(recipe(kind, levers=levers, method="lora"), quiet=True)
    assert record.plan is not None, record.events
    for phase in ("first_step", "steady_steps", "evaluate"):
        planned = record.plan["phases"][phase]["live_bytes"]
        assert planned == record.measured.phases[phase].live_bytes, phase  # type: ignore[index]


def test_the_planned_peak_of_a_card_falls(planned_recipe: Callable[..., Any]) -> None:
    """Behaviour: what is off the card is on the host, and depth no longer costs the card
    activations; beside recomputing the inputs of the blocks go as well."""
    loop = {"max_length": 512, "micro_batch_size": 1, "global_batch_size": 1}
    small = {"vocab_size": 101}
    card = devices.generic(8.0)
    plans = [
        plan(planned_recipe(small, levers=levers, loop=loop), card)
        for levers in ([], OFFLOAD, BOTH[:1], BOTH)
    ]
    steady = [p.phases["steady_steps"] for p in plans]
    peaks = [p.live_bytes - p.categories["workspaces"] for p in steady]
    waits = [p.host_bytes for p in steady]
    assert peaks[1] < peaks[0] / 4 and peaks[3] < peaks[2]
    # Nine blocks keep their input, (512, 64) in two bytes.
    assert waits[0] == waits[2] == 0 and waits[3] >= 9 * 512 * 64 * 2
    assert waits[1] > (peaks[0] - peaks[1])
    # torch keeps pinned memory that was given back.
    assert plans[1].phases["evaluate"].host_bytes == waits[1]


@pytest.mark.slow
@pytest.mark.parametrize("levers", [OFFLOAD, BOTH])
def test_a_plan_of_four_blocks_is_that_of_all(
    levers: Any, planned_recipe: Callable[..., Any]
) -> None:
    """Reference: the plan with every block traced; device and host."""
    recipe, card = planned_recipe(levers=levers), devices.generic(8.0)
    short, whole = plan(recipe, card), plan(recipe, card, exact=True)
    for phase in ("first_step", "steady_steps"):
        ours, theirs = short.phases[phase], whole.phases[phase]  # type: ignore[index]
        assert ours.live_bytes == pytest.approx(theirs.live_bytes, rel=0.005)
        assert ours.host_bytes == theirs.host_bytes > 0
    assert short.needed_bytes == pytest.approx(whole.needed_bytes, rel=0.01)


def test_frozen_weights_are_not_copied(planned_recipe: Callable[..., Any]) -> None:
    """Behaviour: with 4-bit weights and their scales, nothing of a matrix's size goes to the host
    beside activations."""
    levers = [{"name": "nf4_weights"}, *OFFLOAD]
    recipe = planned_recipe(levers=levers, loop={"max_length": 56})
    done = rehearse(recipe, inputs_for(recipe)[0], Target("cuda"))
    sizes = {birth.bytes for birth in done.host.births}
    assert sizes and 64 * 160 // 2 not in sizes and 64 * 160 * 2 not in sizes
