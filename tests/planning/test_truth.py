"""Reference: real runs on the CPU. What is planned is what is measured, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import lowres
from tests.conftest import KINDS, sampled

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora with dropout": {
        "method": {"name": "lora", "targets": "all-linear", "dropout": 0.1},
        "levers": [{"name": "gradient_checkpointing"}],
    },
    "autocast": {"loop": {"precision": "bf16"}},
    "4 bits, 8-bit states": {
        "method": "lora", "levers": [{"name": "nf4_weights"}],
        "optimizer": {"name": "adamw_8bit", "lr": 1e-3},
    },
    "8 bits, frozen prefix": {
        "method": "lora", "levers": [{"name": "int8_weights"}],
        "freezing": {"name": "prefix", "frozen": 1},
    },
    "16 bits throughout": {
        "model": {"dtype": "bfloat16"}, "method": {"name": "lora", "targets": "all-linear"},
        "loop": {"precision": "no"},
    },
    "dora, 4 bits": {"method": {"name": "dora", "rank": 4}, "levers": [{"name": "nf4_weights"}]},
    "dora, 8 bits": {"method": {"name": "dora", "rank": 4}, "levers": [{"name": "int8_weights"}]},
    "loha, 4 bits": {"method": {"name": "loha", "rank": 4}, "levers": [{"name": "nf4_weights"}]},
    "pissa, 8 bits": {"method": {"name": "pissa", "rank": 4}, "levers": [{"name": "int8_weights"}]},
}  # fmt: skip


@pytest.mark.parametrize(("variant", "kind"), sampled([*VARIANTS], KINDS, every=3))
def test_planned_bytes_are_measured_bytes(
    variant: str, kind: str, recipe: Callable[..., Any], in_folder: Any
) -> None:
    """The steps and the evaluation are equal; loading and saving may differ by code books."""
    record = lowres.run(recipe(kind, **VARIANTS[variant]), quiet=True)
    assert record.plan is not None, record.events
    for phase in ("first_step", "steady_steps", "evaluate"):
        planned = record.plan["phases"][phase]["live_bytes"]
        assert planned == record.measured.phases[phase].live_bytes, phase  # type: ignore[index]
    for phase in ("load", "save"):
        planned = record.plan["phases"][phase]["live_bytes"]
        measured = record.measured.phases[phase].live_bytes  # type: ignore[index]
        assert planned == pytest.approx(measured, abs=50_000), phase


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(
    recipe: Callable[..., Any], in_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: exit 3, a record that says so, and no weights read; --force runs it."""
    from lowres.bridges import transformers
    from lowres.core.errors import DoesNotFit

    small = recipe(budget={"host_gib": 0.001})
    with monkeypatch.context() as patched:
        patched.setattr(transformers, "load_model", lambda *_: pytest.fail("weights were loaded"))
        with pytest.raises(DoesNotFit, match="nothing was loaded") as refusal:
            lowres.run(small, output_folder=in_folder / "out", quiet=True)
    assert refusal.value.exit_code == 3
    assert '"does_not_fit"' in (in_folder / "out" / "record.json").read_text()
