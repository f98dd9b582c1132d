"""Checkpoints that cannot be loaded: one message that names what is wrong and the mend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import lowres
from lowres.bridges import transformers, unreadable
from lowres.bridges.transformers import resolve
from lowres.core.errors import InputError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
WEIGHTS = "model.safetensors"


def pickled(folder: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def with_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "its_own", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))


CASES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no weights": (lambda m: (m / WEIGHTS).unlink(), ["no file named model.safetensors", "give a"]),
    "pickle": (pickled, ["(pytorch_model.bin)", "LlamaForCausalLM.from_pretrained('"]),
    "no tokenizer": (without_tokenizer, ["no vocabulary of a tokenizer", "copy the tokenizer's"]),
    "its own code": (with_code, ["(auto_map)", "--set model.trust_remote_code=true"]),
    "pointer": (lambda m: (m / WEIGHTS).write_bytes(POINTER), ["'model.safetensors'", "lfs pull"]),
    "pointer of a tokenizer": (
        lambda m: (m / "tokenizer.json").write_bytes(POINTER), ["'tokenizer.json'", "lfs pull"],
    ),
    "cut off": (
        lambda m: (m / WEIGHTS).write_bytes((m / WEIGHTS).read_bytes()[:-9]),
        ["'model.safetensors' is damaged or cut off", "copy it again"],
    ),
}  # fmt: skip


@pytest.fixture
def spoilt(tmp_path: Path) -> Callable[[str], Path]:
    def spoil(case: str) -> Path:
        shutil.copytree(resolve("package:lowres/assets/tiny_lm").location, tmp_path / "m")
        CASES[case][0](tmp_path / "m")
        return tmp_path / "m"

    return spoil


@pytest.mark.parametrize("plan", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_folder_that_cannot_be_loaded(
    case: str, plan: bool, spoilt: Any, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: nothing of the hub is said of a folder, though HF_HUB_OFFLINE is set; a plan,
    which reads some of the files before, says the same."""
    folder = spoilt(case)
    with pytest.raises(InputError) as caught:
        one = recipe(model={"checkpoint": str(folder)})
        lowres.run(one, output_folder=tmp_path / "out", quiet=True, plan=plan)
    (problem,) = caught.value.problems
    assert problem.where == "model.checkpoint" and f"'{folder}'" in problem.text
    assert all(said in problem.text for said in CASES[case][1]), problem.text
    assert "OFFLINE" not in problem.text and not (tmp_path / "out").exists()


def test_the_command_that_is_named_writes_safetensors(
    spoilt: Any,
) -> None:
    """Behaviour: run as it stands in the message, after which the folder loads."""
    folder = spoilt("pickle")
    config = transformers.load_config(str(folder), None, False)
    with pytest.raises(InputError) as caught:
        transformers.load_model(request(folder), config, 0, 0)
    exec(str(caught.value).partition('python -c "')[2].partition('"')[0])  # noqa: S102
    _, fresh = transformers.load_model(request(folder), config, 0, 0)
    assert not fresh


def test_a_damaged_file_of_the_cache() -> None:
    """Behaviour: of a hub id, whose folder is the cache's own."""
    text = unreadable.known("a/b", True, "weights", SafetensorError("header too large"))
    assert text is not None and "(header too large)" in text
    assert "hf download a/b --force-download" in text


def request(folder: Path) -> Any:
    from lowres.core.learner import LoadRequest

    return LoadRequest(
        str(folder), None, "causal", 2, "float32", "eager", "pretrained", trust_remote_code=False
    )
