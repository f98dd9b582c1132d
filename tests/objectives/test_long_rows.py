"""Texts that are longer than a model reads, as each objective encodes them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from lowres.core import registry
from lowres.core.example import Example
from lowres.core.learner import Encoder

LIMIT = 32  # half of what the tokenizer of these tests says that its model reads
TEXT = "The owls sing. " * 40


@pytest.mark.parametrize(
    ("objective", "task", "labelled"),
    [
        ("classification", "grammaticality", {"label": 1}),
        ("label_words", "grammaticality", {"label": 1}),
        ("next_token", "gsm8k", {"answer": " #### 1"}),
        ("next_token", "text", {}),
    ],
)
def test_long_texts_are_cut_without_a_word_of_indexing_errors(
    objective: str, task: str, labelled: dict[str, Any],
    tokenizer_maker: Callable[..., Any], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Behaviour: transformers warns of rows that it is about to see whole; these never are."""
    fields = {"files": ["x"], "valid_files": ["x"]} if task == "text" else {}
    encoder = Encoder(tokenizer_maker(), "decoder", LIMIT)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        rows = registry.load("objective", objective)().rows(
            registry.load("task", task)(**fields),
            [Example("0", TEXT, **labelled)],
            encoder,
            "predict",
        )
    finally:
        logger.removeHandler(caplog.handler)
    assert rows and all(len(row.inputs["input_ids"]) <= LIMIT for row in rows)
    assert not caplog.records


@pytest.mark.parametrize(
    "text", ["猫" * 200, "https://a.b/" + "c" * 400, "Donaudampfschifffahrt " * 20]
)
def test_no_more_is_cut_than_must_be(text: str, tokenizer_maker: Callable[..., Any]) -> None:
    """Behaviour: of scripts without spaces, long names and words of many tokens a row is filled,
    whatever its letters; none is emptied."""
    encoder = Encoder(tokenizer_maker(), "decoder", LIMIT)
    task = registry.load("task", "grammaticality")()
    (row,) = registry.load("objective", "label_words")().rows(
        task, [Example("0", text, label=1)], encoder, "train"
    )
    assert LIMIT // 2 <= len(row.inputs["input_ids"]) <= LIMIT
