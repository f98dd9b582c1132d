"""Small configurations to plan: no weights are ever written for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16",
    "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 9, "vocab_size": 997,
    "max_position_embeddings": 2048, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="session")
def config_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A folder with nothing but a config.json; keyword arguments change it."""

    def make(**changes: Any) -> str:
        folder: Path = tmp_path_factory.mktemp("config")
        (folder / "config.json").write_text(json.dumps(LLAMA | changes), encoding="utf-8")
        return str(folder)

    return make


@pytest.fixture(scope="session")
def planned_recipe(config_folder: Callable[..., str]) -> Callable[..., Any]:
    """A recipe over such a folder: LoRA on every linear layer, two micro-batches an update."""
    from lowres.core.reading import load_recipe

    def make(config: dict[str, Any] | None = None, **changes: Any) -> Any:
        loop = {
            "steps": 3, "micro_batch_size": 1, "global_batch_size": 2, "max_length": 64,
        } | changes.pop("loop", {})  # fmt: skip
        return load_recipe({
            "model": {"checkpoint": config_folder(**(config or {})), "dtype": "bfloat16"}
            | changes.pop("model", {}),
            "task": {"name": "gsm8k"},
            "method": {"name": "lora", "rank": 4, "targets": "all-linear"},
            "objective": {"name": "next_token", "max_new_tokens": 8},
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "loop": loop,
        } | changes)  # fmt: skip

    return make
