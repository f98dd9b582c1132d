"""Frozen weights that stream: equal results, the bytes of two blocks, the plan of a card."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lowres
from lowres.bridges.streaming import streamed_tensors
from lowres.core.errors import InputError
from lowres.memory import device as devices
from lowres.memory.live import LiveBytes
from lowres.run.build import build
from lowres.run.held import held
from lowres.run.plan import plan
from tests.planner.conftest import config_folder, planned_recipe  # noqa: F401

TINY = {"checkpoint": "package:lowres/assets/tiny_lm"}
LORA: dict[str, Any] = {"method": {"name": "lora", "targets": "all-linear"}}
LEVER = "frozen_offload"
# Kind, levers around it, what else is changed.
RUNS: dict[str, tuple[str, list[str], list[str], dict[str, Any]]] = {
    "encoder": ("encoder", [], [], LORA),
    "4 bits, then recomputed": ("decoder", ["nf4_weights"], ["gradient_checkpointing"], LORA),
    "recomputed, then 4 bits": ("decoder", ["gradient_checkpointing"], ["nf4_weights"], LORA),
    "frozen prefix": ("encoder_decoder", [], [], {"freezing": {"name": "prefix", "frozen": 2}}),
}


@pytest.mark.parametrize("case", RUNS)
def test_planned_bytes_are_measured_bytes_and_the_run_is_the_same(
    case: str, recipe: Callable[..., Any], in_folder: Any
) -> None:
    """Reference: the run on the CPU, to the byte; its losses and scores without the lever, exactly:
    a copy of a weight is multiplied with as the weight is."""
    kind, before, after, changes = RUNS[case]
    record = lowres.run(recipe(kind, levers=[*before, LEVER, *after], **changes), quiet=True)
    assert record.plan is not None, record.events
    for phase in ("first_step", "steady_steps", "evaluate"):
        planned = record.plan["phases"][phase]["live_bytes"]
        assert planned == record.measured.phases[phase].live_bytes, phase
    without = lowres.run(recipe(kind, levers=[*before, *after], **changes), quiet=True)
    assert record.losses == without.losses
    assert [s.value for s in record.scores] == [s.value for s in without.scores]


@pytest.mark.parametrize("resident", [2, 3])
@pytest.mark.parametrize("before", [[], ["nf4_weights"], ["gradient_checkpointing"]])
def test_only_the_resident_blocks_are_copied(
    before: list[str], resident: int, recipe: Callable[..., Any]
) -> None:
    """Closed form: after a forward pass, and at the end of the backward one, what is alive is what
    is without the lever, less the weights on the host and with the copies of `resident` of the
    six blocks: autograd keeps no other."""
    alive = []
    lever = {"name": LEVER, "resident": resident}
    for levers in (before, [*before, lever]):
        one = recipe(model=TINY, levers=levers, objective="label_words", **LORA)
        built = build(one)
        built.model.train()
        batch = built.collator(built.train_rows[:2])
        masters = sum(t.nbytes for t in streamed_tensors(built.model))
        with LiveBytes("cpu", held(built.model, built.optimizer)) as counted:
            loss = one.objective.loss(built.learner, batch)
            after_forward = counted.now_bytes
            loss.backward()
            alive.append((after_forward, counted.now_bytes))
    copies = sum(t.nbytes for t in streamed_tensors(built.model)) - masters
    assert copies == masters * resident // 6
    (forward, backward), (pulled_forward, pulled_backward) = alive
    assert pulled_forward == forward + copies - masters
    assert pulled_backward == backward + copies - masters


def tensors_of_a_block(packed: bool) -> list[int]:
    """Bytes of each frozen tensor of a block of width 256: 4 heads, 2 of them for keys and values,
    and 640 hidden units, in 16 bits; or matrices in 4 bits with their doubly quantised scales."""
    norms = [2 * 256] * 2
    matrices = [256 * 256, 128 * 256, 128 * 256, 256 * 256] + [256 * 640] * 3
    if not packed:
        return norms + [2 * count for count in matrices]
    return norms + [
        size
        for count in matrices
        for size in (count // 2, count // 64, 4 * 16, 4, 4 * -(-count // 64 // 256), 4 * 256)
    ]


def test_beside_a_cpu_the_plan_of_the_host_is_what_is_asked_for(
    planned_recipe: Callable[..., Any],  # noqa: F811
) -> None:
    """Closed form: nothing is pinned there, so nothing is rounded."""
    config = {"hidden_size": 256, "intermediate_size": 640}
    found = plan(planned_recipe(config, levers=[LEVER]), devices.of_torch(torch.device("cpu")))
    assert found.phases["steady_steps"].host_bytes == 9 * sum(tensors_of_a_block(packed=False))


@pytest.mark.slow
@pytest.mark.parametrize("levers", [[], ["nf4_weights", "gradient_checkpointing"]])
def test_on_a_card_the_plan_falls_by_all_blocks_but_two(
    levers: list[str],
    planned_recipe: Callable[..., Any],  # noqa: F811
) -> None:
    """Closed form: seven of nine alike blocks are never on the card; all nine are on the host, each
    tensor in a power of two; and the whole depth is traced, which is told."""
    config = {"hidden_size": 256, "intermediate_size": 640}
    card = devices.generic(8.0)
    before = plan(planned_recipe(config, levers=levers), card)
    after = plan(planned_recipe(config, levers=[*levers, LEVER]), card)
    phase = "steady_steps"
    sizes = tensors_of_a_block(packed=bool(levers))
    block = sum(sizes)
    host = after.phases[phase].host_bytes
    assert host == 9 * sum(2 ** math.ceil(math.log2(size)) for size in sizes) > 9 * block
    assert before.phases[phase].host_bytes == 0
    assert before.phases[phase].live_bytes - after.phases[phase].live_bytes == 7 * block
    assert before.phases["load"].live_bytes - after.phases["load"].live_bytes >= 9 * block
    assert after.needed_bytes < before.needed_bytes
    assert after.host_needed_bytes > host
    assert any("the whole depth was traced" in note for note in after.notes)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"method": "full"}, "leaves no frozen weights"),
        ({"levers": ["int8_weights", LEVER], **LORA}, "a second time"),
        ({"levers": [{"name": LEVER, "resident": 1}], **LORA}, "greater than or equal to 2"),
    ],
)
def test_what_cannot_stream_is_refused(
    changes: dict[str, Any], reason: str, recipe: Callable[..., Any]
) -> None:
    """Behaviour: the reason and what works instead, before anything is loaded."""
    with pytest.raises(InputError) as refusal:
        recipe(**{"levers": [LEVER]} | changes)
    assert any(reason in problem.text for problem in refusal.value.problems)
