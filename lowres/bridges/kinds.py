"""What a transformers configuration says of a model's kind: what it reads, and how it is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lowres.core.errors import InputError, Problem
from lowres.core.images import ImageReader
from lowres.core.learner import Head, Kind

_AUTO: dict[Head, str] = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}


def kind_of(config: Any) -> Kind:
    """decoder, encoder, encoder_decoder or vision. Raises InputError for anything else."""
    from transformers.models.auto import modeling_auto as auto

    if getattr(config, "is_encoder_decoder", False):
        return "encoder_decoder"
    if config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    ):
        return "encoder"
    if config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "decoder"
    if config.model_type in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES and hasattr(
        config, "patch_size"
    ):
        return "vision"
    raise InputError(
        "the recipe",
        [
            Problem(
                "model.checkpoint",
                f"its model type '{config.model_type}' is no text decoder, encoder, "
                "encoder-decoder or vision transformer that transformers' Auto classes know",
            )
        ],
    )


def auto_class(head: Head, config: Any) -> Any:
    """transformers' Auto class that loads such a model with such a head."""
    import transformers

    vision = head == "classification" and kind_of(config) == "vision"
    return getattr(transformers, "AutoModelForImageClassification" if vision else _AUTO[head])


def vocabulary_of(config: Any) -> int:
    """Rows of the embedding table; 0 where a model reads no words."""
    return int(getattr(config.get_text_config(), "vocab_size", 0))


def image_reader(config: Any) -> ImageReader:
    """What a vision transformer reads: square patches of images of one size, and a class token."""
    high, wide = _pair(config.image_size)
    patch_high, patch_wide = _pair(config.patch_size)
    patches = (high // patch_high) * (wide // patch_wide)
    return ImageReader((int(getattr(config, "num_channels", 3)), high, wide), patches + 1)


def _pair(size: Any) -> tuple[int, int]:
    one, other = size if isinstance(size, Iterable) else (size, size)
    return int(one), int(other)
