"""Recipes of three blocks, to see the suite at work on a CPU in a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.recipes import STEPS, Case

_LORA: dict[str, Any] = {"name": "lora"}


def write_configs(folder: Path) -> None:
    """The configurations of the three models."""
    from transformers import BertConfig, LlamaConfig, T5Config

    LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        dtype="bfloat16", pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ).save_pretrained(folder / "decoder")  # fmt: skip
    BertConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=128, pad_token_id=0,
    ).save_pretrained(folder / "encoder")  # fmt: skip
    T5Config(
        vocab_size=512, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    ).save_pretrained(folder / "seq2seq")  # fmt: skip


def cases() -> list[Case]:
    """Eight recipes: each kind of model, methods, levers, stored weights."""
    return [
        _case("decoder-lora", "decoder"),
        _case("decoder-lora-checkpointing", "decoder", levers=["gradient_checkpointing"]),
        _case("decoder-lora-nf4", "decoder", stored=True, levers=["nf4_weights"]),
        _case("decoder-full", "decoder", method={"name": "full"}),
        _case("decoder-full-8bit", "decoder", method={"name": "full"}, optimizer="adamw_8bit"),
        _case("encoder-bitfit", "encoder", method={"name": "bitfit"}),
        _case("encoder-full-float32", "encoder", method={"name": "full"}, dtype="float32"),
        _case("seq2seq-lora", "seq2seq"),
    ]


def _case(
    name: str,
    model: str,
    *,
    method: dict[str, Any] = _LORA,
    levers: list[str] | None = None,
    optimizer: str = "adamw",
    dtype: str = "bfloat16",
    stored: bool = False,
) -> Case:
    task: dict[str, Any] = {"name": "text", "files": ["none.txt"]}
    task = {"encoder": {"name": "sst2"}, "seq2seq": {"name": "gsm8k"}}.get(model, task)
    objective: Any = {"name": "next_token", "max_new_tokens": 4}
    raw = {
        "schema": 1,
        "model": {"checkpoint": model, "init": "pretrained" if stored else "random",
                  "dtype": dtype},
        "task": task,
        "method": method,
        "objective": "classification" if model == "encoder" else objective,
        "optimizer": {"name": optimizer, "lr": 1e-4},
        "levers": levers or [],
        "loop": {"steps": STEPS, "micro_batch_size": 2, "global_batch_size": 4, "max_length": 32,
                 "seed": 1},
    }  # fmt: skip
    return Case(name, model, raw, longest=128, stored=stored)
