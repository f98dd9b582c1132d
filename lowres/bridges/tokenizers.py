"""The tokenizer of a checkpoint before it is read, and one to plan with where it has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowres.bridges import transformers as bridge
from lowres.core.errors import InputError


def has_tokenizer(checkpoint: str) -> bool:
    """Whether a tokenizer can be expected there: a folder may hold a configuration alone."""
    found = bridge.resolve(checkpoint)
    names = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
    return found.is_hub or any((Path(found.location) / name).is_file() for name in names)


def missing_pad_token(checkpoint: str) -> str | None:
    """A token to pad with, where the checkpoint's tokenizer is at hand and names none."""
    found = bridge.resolve(checkpoint)
    if found.is_hub or not has_tokenizer(checkpoint):
        return None
    from transformers import AutoTokenizer

    with bridge.explained(checkpoint, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(found.location)
    return None if tokenizer.pad_token is not None else tokenizer.eos_token or tokenizer.unk_token


def stand_in_tokenizer(vocabulary: int, words: tuple[str, ...], longest: int, typed: bool) -> Any:
    """A tokenizer for planning where the checkpoint's is not at hand: one token a word.

    Args:
        vocabulary: Rows of the model's embedding table.
        words: Words that must be tokens of their own (label words).
        longest: Its `model_max_length`.
        typed: Whether rows carry `token_type_ids`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]
    kept = [*special, *dict.fromkeys(w.strip() for w in words), "word"]
    if vocabulary < len(kept):
        raise InputError("the recipe", [f"a vocabulary of {vocabulary} is too small to plan for"])
    table = {word: i for i, word in enumerate(kept)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=longest, pad_token="<pad>", bos_token="<s>",
        eos_token="</s>", mask_token="<mask>", unk_token="<unk>",
        model_input_names=["input_ids", *(["token_type_ids"] if typed else []), "attention_mask"],
    )  # fmt: skip
    # Assumed texts are longer than any row on purpose, which it would warn of.
    made.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return made
