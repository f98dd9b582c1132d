"""A model of some kilobytes with random weights and with biases, for trying parts out."""

from __future__ import annotations

import shutil
from pathlib import Path

from lowres.bridges.transformers import resolve


def write_opt(folder: Path, tokenizer_of: str) -> Path:
    """Write a checkpoint of an OPT with three blocks.

    Args:
        tokenizer_of: A local checkpoint whose tokenizer it takes.
    """
    import torch
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(resolve(tokenizer_of).location)
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=64, word_embed_proj_dim=64, ffn_dim=128,
        num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=128, dropout=0.0,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    shutil.rmtree(folder, ignore_errors=True)
    OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
