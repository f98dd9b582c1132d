"""What a run that goes on takes from before, and what must not have changed meanwhile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import lowres
from lowres.core.errors import InputError
from lowres.run import evaluate
from lowres.run.session import TrainingSession


@pytest.fixture
def keys(
    raw_recipe: Callable[..., dict[str, Any]], checkpoints: dict[str, Path], tmp_path: Path
) -> dict[str, Any]:
    """Of a run whose model and text may be changed, with one update made of two."""
    shutil.copytree(checkpoints["decoder"], tmp_path / "model")
    (tmp_path / "a.txt").write_text("\n\n\n".join(["the tall man sees a dog " * 5] * 8))
    keys = raw_recipe(
        model={"checkpoint": str(tmp_path / "model")},
        task={"name": "text", "files": [str(tmp_path / "a.txt")]},
        objective="next_token", method="lora",
        loop={"steps": 2, "save_every": 1},
    )  # fmt: skip
    lowres.run(lowres.load_recipe(keys), output_folder=tmp_path / "out", quiet=True, plan=False)
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    (tmp_path / "out" / "record.json").unlink()
    return keys


def go_on(keys: dict[str, Any], tmp_path: Path) -> Any:
    one = lowres.load_recipe(keys)
    out = tmp_path / "out"
    return lowres.run(one, output_folder=out, resume="latest", quiet=True, plan=False)


def test_with_other_rows_it_is_refused(keys: dict[str, Any], tmp_path: Path) -> None:
    """Behaviour: the file was written anew, with as many rows; as it was, the run goes on."""
    before = (tmp_path / "a.txt").read_text()
    (tmp_path / "a.txt").write_text(before.replace("dog", "cat"))
    with pytest.raises(InputError, match="the training rows are not those") as refused:
        go_on(keys, tmp_path)
    assert "weights" not in str(refused.value)
    (tmp_path / "a.txt").write_text(before)
    # One from before this was written down goes on unasked.
    progress = tmp_path / "out" / "checkpoint-1" / "progress.json"
    told = json.loads(progress.read_text())
    assert told.pop("rows") and told.pop("base")
    progress.write_text(json.dumps(told))
    assert go_on(keys, tmp_path).outcome == "ok"


def test_beside_other_weights_it_is_refused(keys: dict[str, Any], tmp_path: Path) -> None:
    """Behaviour: the adapter was trained beside what lay there before."""
    file = tmp_path / "model" / "model.safetensors"
    weights = {name: value + 0.01 for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="the weights of model.checkpoint are not those"):
        go_on(keys, tmp_path)


def test_as_many_rows_are_scored_at_once_as_are_trained_on(
    recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: after the micro-batch was halved, also of those; a size of its own stays."""
    begun = TrainingSession.updates
    seen: list[int] = []

    def halved(self: TrainingSession) -> Any:
        self.progress.micro_batch_size = 2
        return begun(self)

    def collate(rows: Any, *given: Any) -> Any:
        seen.append(len(rows))
        return plain(rows, *given)

    plain = evaluate.collate
    monkeypatch.setattr(TrainingSession, "updates", halved)
    monkeypatch.setattr(evaluate, "collate", collate)
    for own, most in ((None, 2), (8, 8)):
        seen.clear()
        one = recipe(loop={"steps": 1, "eval_batch_size": own})
        lowres.run(one, output_folder=tmp_path / str(own), quiet=True, plan=False)
        assert max(seen) == most
