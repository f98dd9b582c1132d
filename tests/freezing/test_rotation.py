"""Blocks that take turns beside adapters, some of whose parameters belong to no block."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowres
from lowres.core.errors import InputError
from lowres.making.build import build
from tests.conftest import sample_part

SHARED: dict[str, str] = {
    "compacter": r"hypercomplexadapter\.rule\.",
    "compacter_pp": r"hypercomplexadapter\.rule\.",
    "prefix_tuning": r"keyvalueprefix\.(vectors$|down\.)",
    "mam": r"keyvalueprefix\.(vectors$|down\.)",
    "unipelt": r"gatedprefix\.(vectors$|down\.)",
}
"""Names of what blocks share: the rule of Compacter; of prefixes the vectors, and the first layer
of the network over them."""
TURNS = 4


@pytest.fixture
def turning(recipe: Callable[..., Any]) -> Callable[..., Any]:
    """A recipe whose blocks take turns, two updates each."""

    def make(method: str, freezing: str, kind: str = "decoder", **changes: Any) -> Any:
        fields = sample_part("freezing", freezing) | {"period": 2}
        keys = sample_part("method", method)
        if method in SHARED and not method.startswith("prefix"):
            keys["activation"] = "gelu"  # a unit of relu may rest
        return recipe(kind, method=keys, freezing=fields, objective="label_words", **changes)

    return make


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
@pytest.mark.parametrize("freezing", ["lisa", "badam"])
@pytest.mark.parametrize("method", SHARED)
def test_what_a_block_has_alone_takes_turns_and_what_blocks_share_trains_always(
    method: str, freezing: str, kind: str, turning: Callable[..., Any]
) -> None:
    """Behaviour: by what moves in the first update of each period, and what has states after it."""
    one = turning(method, freezing, kind)
    built = build(one)
    named = {n: p for n, p in built.model.named_parameters() if p.requires_grad}
    with torch.no_grad():  # From zeros the first gradients of some would be zeros.
        for parameter in named.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for group in built.optimizer.param_groups:
        group["lr"] = 1e-2
    blocks = built.learner.blocks.names
    of = {n: next((b for b in blocks if f"{b}." in n), None) for n in named}
    shared = {n for n in named if re.search(SHARED[method], n)}
    assert shared and shared < {n for n in named if of[n]}
    batch = built.collator(built.train_rows[:4])
    seen = set()
    for turn in range(TURNS):
        built.rotation.turn(built.optimizer, 2 * turn)
        active = one.freezing.active(blocks, turn)
        before = {n: p.detach().clone() for n, p in named.items()}
        one.objective.loss(built.learner, batch).backward()
        built.optimizer.step()
        built.optimizer.zero_grad()
        moved = {n for n, p in named.items() if not torch.equal(p, before[n])}
        always = shared | {n for n in named if of[n] is None}
        assert moved == always | {n for n in named if of[n] in active}
        assert {n for n, p in named.items() if built.optimizer.state.get(p)} == moved
        seen |= active
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("method", "freezing"),
    [("compacter", "lisa"), pytest.param("mam", "badam", marks=pytest.mark.slow)],
)
def test_a_plan_holds_and_a_run_that_died_goes_on(
    method: str, freezing: str, turning: Callable[..., Any], tmp_path: Path
) -> None:
    """Reference: bytes measured in the run, by phase, and the losses of the run without a break."""
    one = turning(method, freezing, loop={"steps": 5, "save_every": 3})
    whole = lowres.run(one, output_folder=tmp_path / "out", quiet=True)
    assert whole.outcome == "ok" and whole.plan is not None
    for phase in ("load", "first_step", "steady_steps", "save"):
        planned = whole.plan["phases"][phase]["live_bytes"]
        assert planned >= whole.measured.phases[phase].live_bytes, phase
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    again = lowres.run(one, resume=checkpoint, quiet=True, plan=False)
    assert again.losses == whole.losses


@pytest.mark.parametrize("method", ["intrinsic_said", "lorta"])
def test_a_method_that_has_nothing_to_take_turns_is_refused(
    method: str, turning: Callable[..., Any]
) -> None:
    """Behaviour: all of it, or all but a number for each layer, is shared."""
    with pytest.raises(InputError, match="beside 'lisa': .* of all blocks.* take turns"):
        turning(method, "lisa")
