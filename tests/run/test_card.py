"""The README.md beside a saved model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import lowres
from lowres.run import card


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("encoder", {"method": "lora"}),
        ("encoder", {"method": "ia3", "model": {"checkpoint": "package:lowres/assets/tiny_lm"}}),
        ("decoder", {"method": "houlsby", "objective": "label_words"}),
        ("encoder", {"method": "prompt_tuning"}),
        ("encoder", {"method": "prompt_tuning", "objective": "label_words"}),
        ("decoder", {"method": "full", "objective": "label_words"}),
    ],
)
def test_its_code_loads_what_was_trained(
    kind: str, changes: dict[str, Any], recipe: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Behaviour: run as it stands in the model's folder; the tensors are those of the file."""
    one = recipe(kind, **changes)
    assert lowres.run(one, output_folder=tmp_path / "run", quiet=True, plan=False).outcome == "ok"
    monkeypatch.chdir(tmp_path / "run" / "model")
    text = Path("README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    there: dict[str, Any] = {}
    exec(code, there)  # noqa: S102
    (file,) = Path().glob("*.safetensors")
    model = there["model"]
    adapted = isinstance(model, peft.PeftModel)
    held = peft.get_peft_model_state_dict(model) if adapted else model.state_dict()
    saved = load_file(file)
    assert saved and saved.keys() <= held.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in saved.items())


def test_a_card_that_cannot_be_made_costs_no_run(
    recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Behaviour: it is said, and the record stands."""
    monkeypatch.setattr(card, "write", lambda *given: {}["nothing"])
    done = lowres.run(recipe(loop={"steps": 1}), output_folder=tmp_path / "run", plan=False)
    assert done.outcome == "ok" and (tmp_path / "run" / "record.json").exists()
    assert "card could not be written" in capsys.readouterr().err
