"""Adapters that are damaged, or of another model: one message that names the file and the fix."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowres.bridges import peft as bridge
from lowres.bridges.blocks import map_blocks
from lowres.core import registry
from lowres.core.errors import InputError
from tests.methods.adapted import gpt2, llama

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], Path]:
    """The folder of a method's adapter of a model of width 32."""

    def save(method: str) -> Path:
        model: Any = llama()
        one = registry.load("method", method)()
        one.apply(model, map_blocks(model)).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def refusal(model: Any, folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        bridge.load_adapter(model, folder)
    (problem,) = caught.value.problems
    assert problem.where.startswith(str(folder)) and "folder `model`" in problem.text
    return str(problem)


@pytest.mark.parametrize(
    "method, said",
    [
        ("lora", r"q_proj.lora_A.weight is \dx32, wanted \dx64 \(and \d+ more\)"),
        ("houlsby", r"is \d*x?32, wanted \d*x?64 \(and \d+ more\)"),
        ("prompt_tuning", r"prompt_embeddings is \d+x32, wanted \d+x64;"),
        ("p_tuning", r"prompt_embeddings is \d+x32, wanted \d+x64;"),
    ],
)
def test_an_adapter_of_a_narrower_model(method: str, said: str, saved: Any) -> None:
    """Behaviour: the first tensor and both its sizes; prompts are as wide as their configuration
    says, and are compared with the model's embeddings."""
    text = refusal(llama(hidden_size=64), saved(method))
    assert "of another model" in text and "\n" not in text
    assert re.search(said, text), text


def test_an_adapter_of_another_architecture(saved: Any) -> None:
    """Behaviour: layers of the adapter's configuration are not in the model."""
    assert "finds no place in the model: Target modules" in refusal(gpt2(), saved("lora"))


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"peft_type": "NO_SUCH"}', b"\xff\xfe"]
)
def test_a_damaged_configuration(method: str, content: bytes, saved: Any) -> None:
    """Behaviour."""
    folder = saved(method)
    (folder / CONFIG).write_bytes(content)
    text = refusal(llama(), folder)
    assert CONFIG in text and "no configuration of an adapter" in text and "copy it again" in text


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
@pytest.mark.parametrize("keep", [0, 5, -10])
def test_a_file_of_tensors_that_is_cut_off(method: str, keep: int, saved: Any) -> None:
    """Behaviour: empty, within its header and within its tensors."""
    folder = saved(method)
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:keep])
    text = refusal(llama(), folder)
    assert TENSORS in text and "damaged or cut off" in text and "copy it again" in text
