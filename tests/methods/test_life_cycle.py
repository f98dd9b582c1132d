"""Every method of lowres's own as a plain PEFT adapter, from its making to its merging.

One process imports lowres, then calls PEFT and transformers alone (`plain_peft.py`). The
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
from safetensors.torch import save_file

from lowres.bridges import transformers
from lowres.core import registry
from lowres.core.choosing import Choosing
from lowres.making.build import build
from lowres.methods._adapter import Adapter
from tests.conftest import ROOT, sample_part
from tests.methods import plain_peft

CLASSES: dict[str, Any] = {name: registry.load("method", name) for name in registry.names("method")}
OWN = {name: cls for name, cls in CLASSES.items() if issubclass(cls, Adapter)}
# They look at training rows to be made: lowres makes them, and life begins with what was saved.
CHOOSING = {name: cls for name, cls in CLASSES.items() if issubclass(cls, Choosing)}
SCRIPT = Path(__file__).with_name("plain_peft.py")
CHECKS = 12


def told_of(cls: Any) -> dict[str, Any]:
    return {
        "settings": dict(cls.sample_fields), "starts_as_base": cls.starts_as_base,
        "mergeable": cls.mergeable,
    }  # fmt: skip


def lives(base: Path, folder: Path, told: dict[str, Any], *how: str) -> dict[str, dict[str, Any]]:
    """What a process of its own finds."""
    (folder / "methods.json").write_text(json.dumps(told), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *(how or (str(SCRIPT),)), str(base), "methods.json", str(folder)],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def found(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, recipe: Any
) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("adapters")
    told = {name: told_of(cls) for name, cls in OWN.items()}
    for name, cls in CHOOSING.items():
        built = build(recipe(method=sample_part("method", name), objective="label_words"))
        plain_peft.train(built.model, 3)
        transformers.save(built.model, built.tokenizer, folder / name)
        save_file({"logits": plain_peft.logits(built.model)}, folder / name / plain_peft.LOGITS)
        trainable = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
        told[name] = {**told_of(cls), "trainable": trainable}
    return lives(checkpoints["decoder"], folder, told)


def test_every_method_of_its_own_is_among_them(recipe: Any) -> None:
    """Reference: the kind of adapter that each other method makes is none of lowres's."""
    assert OWN and CHOOSING
    for name in CLASSES.keys() - OWN.keys() - CHOOSING.keys():
        model: Any = build(recipe(method=sample_part("method", name))).model
        adapters = getattr(model, "peft_config", {})
        assert "LOWRES_DELTA" not in [config.peft_type for config in adapters.values()], name


@pytest.mark.parametrize("method", sorted([*OWN, *CHOOSING]))
def test_plain_peft_and_transformers_take_an_adapter_through_its_life(
    method: str, found: dict[str, dict[str, Any]]
) -> None:
    """Reference: logits of the plain and of the trained model at every station, bit for bit; after
    merging, to float32's rounding of W x + D x against (W + D) x.
    """
    checks = found[method]
    assert {name: told for name, told in checks.items() if told is not True} == {}
    assert len(checks) == CHECKS - (method in CHOOSING)


def test_peft_may_be_imported_first(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Behaviour: the life of one adapter where PEFT was there before lowres."""
    name = next(iter(OWN))
    again = f"import peft, runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    found = lives(checkpoints["decoder"], tmp_path, {name: told_of(OWN[name])}, "-c", again)
    assert set(found[name].values()) == {True} and len(found[name]) == CHECKS
