"""`lowres export`: from a run's folder to a plain model. What merging itself does is tested where
it lies, in tests/run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import lowres
from lowres.core.errors import LowresError


def test_a_run_becomes_a_plain_model(
    raw_recipe: Callable[..., dict[str, Any]], command: Callable[..., Any], in_folder: Path
) -> None:
    """Behaviour: transformers loads it; nothing but JSON on the output; a folder that is taken and
    one that is no run's are refused."""
    from transformers import AutoModelForSequenceClassification

    (in_folder / "r.yaml").write_text(yaml.safe_dump(raw_recipe("encoder", method="lora")))
    lowres.run(lowres.load_recipe("r.yaml"), output_folder="run", quiet=True, plan=False)
    done = command("export", "run", "--output", "merged", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["folder"] == "merged" and told["distance"] < 1e-4 < told["effect"]
    model = AutoModelForSequenceClassification.from_pretrained("merged")
    assert not hasattr(model, "peft_config")
    assert not (in_folder / "merged" / "adapter_config.json").exists()
    done = command("export", "run", "--output", "narrow", "--set", "model.dtype=bfloat16")
    assert done.stdout.startswith("merged: narrow (bfloat16)\nlogits"), done.stderr
    taken = command("export", "run", "--output", "merged")
    assert taken.returncode == 2 and "is not empty; name another folder" in taken.stderr
    other = command("export", ".", "--output", "other")
    assert other.returncode == 2 and "holds no recipe.yaml" in other.stderr
    assert not (in_folder / "other").exists()


def test_what_the_command_was_given_is_handed_on(
    raw_recipe: Callable[..., dict[str, Any]], command: Callable[..., Any], in_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Behaviour: the base is taken at its word when asked; a merge that went wrong is exit 1."""
    (in_folder / "recipe.yaml").write_text(yaml.safe_dump(raw_recipe(method="lora")))
    given: list[dict[str, Any]] = []

    def merge(recipe: Any, adapter: Path, into: Path, **named: Any) -> None:
        given.append(named | {"adapter": adapter, "into": into})
        raise LowresError("the logits are off")

    monkeypatch.setattr("lowres.run.merging.merge", merge)
    for flag in ([], ["--same-base"]):
        done = command("export", ".", "--output", "merged", *flag)
        assert done.returncode == 1 and done.stderr == "lowres: the logits are off\n"
    here = {"adapter": Path("model"), "into": Path("merged")}
    assert given == [here | {"same_base": False}, here | {"same_base": True}]
