"""What every procedure promises, without naming one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lowres
from lowres.core import registry
from lowres.core.errors import OutOfTime
from tests.conftest import sample_part, sampled

PROCEDURES = registry.names("procedure")
METHODS = registry.names("method")
STEPS = 5


def test_there_are_procedures() -> None:
    """Behaviour: the listing is not empty."""
    assert PROCEDURES


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "model").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(("procedure", "method"), sampled(PROCEDURES, METHODS, every=16))
def test_it_can_be_stopped_after_every_update_and_resumed(
    procedure: str, method: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Reference: the uninterrupted run; losses and weights bit for bit, with each method.

    Every part of the run ends after one update, because its time budget is used up.
    """
    changes = {
        "procedure": sample_part("procedure", procedure),
        "method": sample_part("method", method),
        "loop": {"steps": STEPS, "eval_every": 2, "save_every": 2, "warmup_ratio": 0.4},
    }
    whole = lowres.run(
        recipe("encoder", **changes), output_folder=tmp_path / "whole", quiet=True, plan=False
    )
    hurried = recipe("encoder", budget={"minutes": 1e-9}, **changes)
    resume = None
    for _ in range(STEPS - 1):
        with pytest.raises(OutOfTime):
            lowres.run(
                hurried, output_folder=tmp_path / "parts", resume=resume, quiet=True, plan=False
            )
        resume = "latest"
    parts = lowres.run(
        hurried, output_folder=tmp_path / "parts", resume=resume, quiet=True, plan=False
    )
    assert parts.losses == whole.losses and len(whole.losses) == STEPS
    assert [s.value for s in parts.scores] == [s.value for s in whole.scores]
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_the_default_setting_equals_a_loop_written_by_hand(
    procedure: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Reference: forward, backward, clip, step over the same rows; to float32 rounding."""
    from lowres.core import schedule
    from lowres.making.data import Order

    one = recipe("encoder", procedure=sample_part("procedure", procedure), loop={"steps": STEPS})
    ours = lowres.run(one, output_folder=tmp_path / "ours", quiet=True, plan=False)
    built = lowres.build(one)
    order = Order([r.length for r in built.train_rows], 8, STEPS, one.loop.seed)
    built.model.train()
    theirs, norms = [], []
    for step in range(STEPS):
        batch = built.collator([built.train_rows[i] for i in order.rows(step)])
        logits = built.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        loss = torch.nn.functional.cross_entropy(logits.logits, batch["labels"][:, 0])
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(built.model.parameters(), 1.0)))
        for group in built.optimizer.param_groups:
            group["lr"] = one.optimizer.lr * schedule.factor("linear", step, STEPS, 0)
        built.optimizer.step()
        built.optimizer.zero_grad()
        theirs.append(float(loss.detach()))
    assert ours.losses == pytest.approx(theirs, rel=1e-5)
    # AdamW hides a wrong scale of the gradients from the losses; their norm does not.
    log = (tmp_path / "ours" / "losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["grad_norm"] for line in log] == pytest.approx(norms, rel=1e-4)
