"""What every objective promises, without naming one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowres.core import registry
from lowres.core.example import collate
from lowres.making.build import build
from tests.conftest import KINDS, ROOT, sample_part

OBJECTIVES = registry.names("objective")


def test_there_are_objectives() -> None:
    """Reference: the files of the folder."""
    files = (ROOT / "lowres" / "objectives").glob("[!_]*.py")
    assert OBJECTIVES and OBJECTIVES == sorted(file.stem for file in files)


CASES = [
    (o, kind, asks)
    for o in OBJECTIVES
    for kind in KINDS
    for asks in ("label", "answer", "likelihood")
    if kind in registry.load("objective", o).heads and asks in registry.load("objective", o).serves
]


@pytest.fixture(params=CASES, ids=["-".join(c) for c in CASES])
def built(request: pytest.FixtureRequest, recipe: Callable[..., Any], tmp_path: Path) -> Any:
    """(recipe, built) in float64 for each objective x kind of model x kind of task it serves."""
    name, kind, asks = request.param
    text = tmp_path / "t.txt"
    text.write_text("\n\n\n".join("The owls " + "sing and " * n + "sleep." for n in range(1, 8)))
    table = tmp_path / "gsm8k"
    table.mkdir()
    rows = [f'{{"question": "{"one and " * n}?", "answer": "It is #### {n}"}}' for n in range(1, 8)]
    for split in ("train", "test"):
        (table / f"{split}.jsonl").write_text("\n".join(rows))
    task: Any = {
        "label": {"name": "grammaticality", "train_examples": 8, "eval_examples": 4},
        "answer": {"name": "gsm8k", "folder": str(table)},
        "likelihood": {"name": "text", "files": [str(text)], "valid_files": [str(text)]},
    }[asks]
    objective = sample_part("objective", name)
    if asks == "answer":
        objective["max_new_tokens"] = 8
    one = recipe(kind, objective=objective, task=task, loop={"max_length": 48})
    made = build(one)
    made.model.double()
    return one, made


def loss_of(one: Any, made: Any, rows: Any, side: str = "right") -> torch.Tensor:
    return one.objective.loss(made.learner, collate(rows, 0, side))


def test_the_gradient_is_that_of_the_loss(built: Any) -> None:
    """Closed form: central difference along a random unit direction in float64.

    Tolerance: the difference's own error at this step. T5 computes its norms in float32 whatever
    the model's type, which leaves 1e-7 / step of noise in the difference.
    """
    one, made = built
    batch = made.collator(made.train_rows[:3])
    trained = [p for p in made.model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trained]
    norm = sum(float((d**2).sum()) for d in direction) ** 0.5
    direction = [d / norm for d in direction]
    one.objective.loss(made.learner, batch).backward()
    noise = 5e-2 if made.learner.kind == "encoder_decoder" else 1e-6
    pairs = zip(trained, direction, strict=True)
    slope = sum(float((p.grad * d).sum()) for p, d in pairs if p.grad is not None)
    step, ends = 1e-4, []
    with torch.no_grad():
        for sign in (1, -1):
            for p, d in zip(trained, direction, strict=True):
                p.add_(d, alpha=sign * step)
            ends.append(float(one.objective.loss(made.learner, batch)))
            for p, d in zip(trained, direction, strict=True):
                p.add_(d, alpha=-sign * step)
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=noise)


def test_padding_changes_no_loss(built: Any) -> None:
    """Reference: each row alone. Tolerance: rounding of reordered sums."""
    one, made = built
    rows = made.train_rows[:5]
    with torch.no_grad():
        together = float(loss_of(one, made, rows))
        alone = sum(float(loss_of(one, made, [row])) for row in rows)
    assert len({r.length for r in rows}) > 1, "the rows are all of one length: nothing is padded"
    assert together == pytest.approx(alone, rel=1e-5)


def test_the_order_of_rows_changes_no_loss(built: Any) -> None:
    """Reference: the reversed batch."""
    one, made = built
    rows = made.train_rows[:5]
    with torch.no_grad():
        assert float(loss_of(one, made, rows)) == pytest.approx(
            float(loss_of(one, made, rows[::-1])), rel=1e-5
        )


def test_the_targets_of_a_batch_are_the_sum_of_its_rows(built: Any) -> None:
    """Reference: row by row; accumulation divides by this count."""
    one, made = built
    rows = made.train_rows[:5]
    count = one.objective.targets(collate(rows, 0))
    assert count == sum(one.objective.targets(collate([row], 0)) for row in rows) > 0


def test_there_is_one_prediction_for_each_row(built: Any) -> None:
    """Behaviour, on evaluation rows padded as the objective asks."""
    one, made = built
    made.model.float().eval()
    for _, (_, rows) in made.inputs.data.evaluation.items():
        side = one.objective.padding_side("predict", one.task, made.learner.kind)
        with torch.no_grad():
            found = one.objective.predict(made.learner, collate(rows[:3], 0, side), one.task)
        assert len(found) == len(rows[:3])
