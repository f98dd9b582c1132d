"""Plans of configurations alone: depth, categories, verdicts, and what goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lowres.core.errors import InputError
from lowres.core.plan import to_json
from lowres.memory import device as devices
from lowres.memory.tracer import TraceFailed
from lowres.memory.translate import Target
from lowres.planning.assumed import inputs_for
from lowres.planning.plan import plan, with_budget
from lowres.planning.rehearsal import rehearse
from lowres.planning.starting import starting_recipe
from tests.conftest import sampled

CKPT = {"levers": [{"name": "gradient_checkpointing"}]}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": CKPT,
    "full, foreach": {
        "method": "full", "optimizer": {"name": "adamw", "lr": 1e-3, "implementation": "foreach"},
    },
    "frozen prefix": {"freezing": {"name": "prefix", "frozen": 4}} | CKPT,
    "4 bits": {"levers": [{"name": "nf4_weights"}, {"name": "gradient_checkpointing"}]},
    "adapters behind": {"method": "houlsby"},
    "adapters beside, frozen prefix": {
        "method": "scaled_parallel", "freezing": {"name": "prefix", "frozen": 3}, **CKPT,
    },
    "autocast": {"loop": {"precision": "bf16"}, "model": {"dtype": "float32"}},
}  # fmt: skip


@pytest.mark.parametrize(("variant", "target"), sampled([*VARIANTS], ["cpu", "cuda"], every=7))
def test_four_blocks_extended_are_all_blocks_traced(
    variant: str, target: Any, planned_recipe: Callable[..., Any]
) -> None:
    """Reference: the trace of every block. Not only peaks: the sizes of all events, in order."""
    recipe = planned_recipe(**VARIANTS[variant])
    inputs, _ = inputs_for(recipe)
    short = rehearse(recipe, inputs, Target(target))
    whole = rehearse(recipe, inputs, Target(target), whole=True)
    assert sum(len(run.kept) for run in short.runs) < 9
    assert [at for _, at in short.trace.marks] == [at for _, at in whole.trace.marks]
    live = [np.cumsum(done.trace.sizes) for done in (short, whole)]
    # Lists over all parameters (norms of gradients) have a few bytes for each.
    assert np.abs(live[0] - live[1]).max() <= 8 * short.total // 1000
    for (_, begin), (_, end) in zip(short.trace.marks, short.trace.marks[1:], strict=False):
        if end > begin:
            assert live[0][begin:end].max() == pytest.approx(live[1][begin:end].max(), rel=0.005)


def test_an_extended_trace_frees_only_what_is_alive(planned_recipe: Callable[..., Any]) -> None:
    """Behaviour: every death follows the birth of the same storage, once."""
    recipe = planned_recipe(**VARIANTS["4 bits"])
    trace = rehearse(recipe, inputs_for(recipe)[0], Target("cuda")).trace
    alive: dict[int, int] = {}
    for tensor, size in zip(trace.tensors, trace.sizes, strict=True):
        if size > 0:
            assert tensor not in alive
            alive[tensor] = size
        else:
            assert alive.pop(tensor) == -size


def test_weights_and_states_have_their_closed_form(planned_recipe: Callable[..., Any]) -> None:
    """Closed form: 2 bytes a weight, 4 and 8 bytes a LoRA parameter and its two moments."""
    found = plan(planned_recipe(), devices.generic(8.0))
    steady = found.phases["steady_steps"].categories
    adapters = found.trainable * 4
    assert steady["adapters"] == adapters
    # One step counter of 4 bytes a tensor: 9 blocks, 7 layers, 2 matrices.
    assert steady["optimizer states"] == 2 * adapters + 4 * 9 * 7 * 2
    assert steady["weights"] >= 2 * (found.total - found.trainable)
    assert steady["weights"] <= 2 * (found.total - found.trainable) + 4096
    assert sum(steady.values()) == found.phases["steady_steps"].live_bytes


def test_four_bit_weights_have_their_closed_form(planned_recipe: Callable[..., Any]) -> None:
    """Closed form: half a byte a weight of the blocks' matrices; the rest stays in 16 bits."""
    dense = plan(planned_recipe(), devices.generic(8.0))
    packed = plan(planned_recipe(**VARIANTS["4 bits"]), devices.generic(8.0))
    matrices = 9 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 160)
    saved = dense.peak.categories["weights"] - packed.peak.categories["weights"]
    assert saved == matrices * 2 - matrices // 2
    assert packed.total == dense.total


def test_a_plan_is_deterministic_and_says_how_it_was_made(
    planned_recipe: Callable[..., Any],
) -> None:
    """Behaviour: the same recipe gives the same figures; shapes and depth are told."""
    one, two = (plan(planned_recipe(), devices.load("rtx-4090")) for _ in range(2))
    assert one.phases == two.phases and one.step == two.step
    assert "assumed" in one.shapes and "4 of 9" in one.depth
    assert one.step is not None and one.step.low_seconds < one.step.seconds
    assert to_json(one).startswith("{")


def test_what_fits_is_decided_by_the_allocator(planned_recipe: Callable[..., Any]) -> None:
    """Behaviour: a card with what is needed fits, one with 2 MiB less than that does not."""
    recipe = planned_recipe()
    card = devices.generic(8.0)
    needed = plan(recipe, card).needed_bytes
    gib = (1 << 30) * 1.0
    assert plan(planned_recipe(budget={"device_gib": needed / gib}), card).fits
    assert (
        plan(planned_recipe(budget={"device_gib": (needed - (4 << 20)) / gib}), card).fits is False
    )


def test_no_attention_matrix_on_cuda(planned_recipe: Callable[..., Any]) -> None:
    """Behaviour: the fused kernel keeps no (T, T) scores; eager attention does, for every head."""
    long = {"loop": {"max_length": 512}}
    fused = plan(planned_recipe(**long), devices.generic(8.0))
    eager = plan(planned_recipe(model={"attention": "eager"}, **long), devices.generic(8.0))
    scores = 9 * 4 * 512 * 512 * 2
    more = eager.peak.categories["activations"] - fused.peak.categories["activations"]
    assert more >= scores


class TestBadInput:
    """Behaviour: one error that names the value, the reason and what to do."""

    def test_unknown_architecture(self, planned_recipe: Callable[..., Any]) -> None:
        with pytest.raises(InputError, match="model.checkpoint"):
            plan(planned_recipe({"model_type": "no_such_type"}), devices.generic(8.0))

    def test_unknown_card(self) -> None:
        with pytest.raises(InputError, match="--device-gib"):
            devices.load("rtx-9999")

    def test_budget_below_the_context(self, planned_recipe: Callable[..., Any]) -> None:
        with pytest.raises(InputError, match="context"):
            plan(planned_recipe(budget={"device_gib": 0.1}), devices.generic(0.1))

    def test_budget_that_is_no_size(self, planned_recipe: Callable[..., Any]) -> None:
        with pytest.raises(InputError, match="such as 8"):
            with_budget(planned_recipe(), -1.0)

    def test_task_that_the_model_cannot_do(self, checkpoints: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="task with labels"):
            starting_recipe(str(checkpoints["encoder"]), "gsm8k")

    def test_model_id_while_offline(self, planned_recipe: Callable[..., Any]) -> None:
        with pytest.raises(InputError, match="config.json in a folder"):
            plan(planned_recipe(model={"checkpoint": "nobody/nothing"}), devices.generic(8.0))

    def test_code_that_needs_data_is_named(
        self, planned_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from lowres.objectives import next_token

        def loss(self: Any, learner: Any, batch: Any) -> Any:
            scores = learner.logits(batch)
            return scores[scores > 0].sum()

        monkeypatch.setattr(next_token.NextToken, "loss", loss)
        with pytest.raises(TraceFailed, match="aten.*nonzero|aten.*index"):
            plan(planned_recipe(), devices.generic(8.0))


def test_several_processes_hold_buckets_of_gradients(planned_recipe: Callable[..., Any]) -> None:
    """Closed form: one more copy of the trained parameters' gradients; half of the rows each."""
    recipe, device = planned_recipe(), devices.generic(8.0)
    one, two = plan(recipe, device), plan(recipe, device, processes=2)
    live = [p.phases["steady_steps"].categories.get("workspaces", 0) for p in (one, two)]
    assert live[1] - live[0] == 4 * one.trainable
    assert one.step is not None and two.step is not None
    assert two.step.seconds < one.step.seconds
