"""Every method of lowres's own as a plain PEFT adapter, from its making to its merging.

One process imports lowres and afterwards calls PEFT and transformers alone (`plain_peft.py`). The
model is a tiny OPT: of the common decoders it alone has biases in every layer, norms with biases
and queries, keys and values apart, so no method lacks a place in it; and it generates.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowres.core import registry
from lowres.methods._adapter import Adapter
from tests.conftest import ROOT

CLASSES: dict[str, Any] = {name: registry.load("method", name) for name in registry.names("method")}
OWN = {name: cls for name, cls in CLASSES.items() if issubclass(cls, Adapter)}
SCRIPT = Path(__file__).with_name("plain_peft.py")


@pytest.fixture(scope="module")
def found(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("adapters")
    told = {
        name: {
            "settings": dict(cls.sample_fields), "starts_as_base": cls.starts_as_base,
            "mergeable": cls.mergeable,
        }
        for name, cls in OWN.items()
    }  # fmt: skip
    (folder / "methods.json").write_text(json.dumps(told), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(checkpoints["decoder"]), "methods.json", str(folder)],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_there_are_methods_of_its_own() -> None:
    """Behaviour: a suite over an empty listing would pass without testing."""
    assert len(OWN) >= 3


@pytest.mark.parametrize("method", sorted(OWN))
def test_plain_peft_and_transformers_take_an_adapter_through_its_life(
    method: str, found: dict[str, dict[str, Any]]
) -> None:
    """Reference: logits of the plain and of the trained model at every station, bit for bit; after
    merging, to float32's rounding of W x + D x against (W + D) x.
    """
    checks = found[method]
    assert {name: told for name, told in checks.items() if told is not True} == {}
    assert len(checks) == 12
