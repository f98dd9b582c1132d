"""Plain text: likelihoods by token and by character, and texts that have none."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowres.core.errors import InputError
from lowres.core.example import Example, Prediction, collate
from lowres.making.build import build
from lowres.tasks.text import Text

OBJECTIVE = {"name": "next_token", "max_new_tokens": 4}


def test_scores_by_hand() -> None:
    """Closed form: 12 nats over 6 targets; 8 tokens stand for 16 characters."""
    task = Text(files=("a",))
    windows = [Prediction((4.0, 2, 4)), Prediction((8.0, 4, 4))]
    scores = task.score([Example("1", "a" * 16)], windows)
    assert scores["perplexity"].value == pytest.approx(math.exp(2))
    assert scores["bits_per_character"].value == pytest.approx(2 * 8 / 16 / math.log(2))
    assert scores["perplexity"].stderr == scores["bits_per_character"].stderr == 0
    high = task.score([Example("1", "a")], [Prediction((1e6, 1, 1))])
    assert high["perplexity"].value == math.inf


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
@pytest.mark.parametrize("start", ["<s>", None])
def test_every_token_of_a_text_is_counted_once(
    kind: str, start: str | None, recipe: Callable[..., Any], checkpoints: dict[str, Path],
    tokenizer_maker: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    """Behaviour: whatever of it is a target, with a start token in each window or without."""
    (tmp_path / "a.txt").write_text("the tall man sees a dog and a cat " * 6)
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoints[kind].iterdir():
        (folder / file.name).symlink_to(file)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    tokenizer_maker(bos_token=start).save_pretrained(folder)
    files = [str(tmp_path / "a.txt")]
    one = recipe(
        kind, task={"name": "text", "files": files, "valid_files": files},
        objective=OBJECTIVE, model={"checkpoint": str(folder)}, loop={"max_length": 16},
    )  # fmt: skip
    built = build(one)
    (((example,), rows),) = built.inputs.data.evaluation.values()
    batch = collate(rows, built.inputs.encoder.pad_id)
    with torch.no_grad():
        predicted = one.objective.predict(built.learner, batch, one.task)
    counted = sum(p.value[2] for p in predicted)
    assert counted == len(built.inputs.encoder.ids(example.text))
    assert sum(p.value[1] for p in predicted) == sum((batch["labels"] != -100).sum(-1).tolist())


def test_a_text_without_a_token_to_score_is_refused(
    recipe: Callable[..., Any], checkpoints: dict[str, Path],
    tokenizer_maker: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    """Behaviour: without a start token nothing comes before the one token that there is."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(checkpoints["decoder"] / name)
    tokenizer_maker(bos_token=None).save_pretrained(folder)
    (tmp_path / "a.txt").write_text("the tall man sees a dog")
    (tmp_path / "b.txt").write_text("a")
    task = {"name": "text", "files": [str(tmp_path / "a.txt")],
            "valid_files": [str(tmp_path / "b.txt")]}  # fmt: skip
    one = recipe(task=task, objective=OBJECTIVE, model={"checkpoint": str(folder)})
    with pytest.raises(InputError, match="no token of the split 'in_domain' can be scored"):
        build(one)
