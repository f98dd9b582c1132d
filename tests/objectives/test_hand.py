"""Each objective on logits small enough to compute by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lowres.core import registry
from lowres.core.blocks import Blocks
from lowres.core.example import IGNORED
from lowres.core.learner import Head, Kind, Learner

NO, YES = 0, 1


class Fixed(nn.Module):
    """Answers with given logits; remembers which columns were asked for."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.answer, self.asked = logits, None
        self.config = SimpleNamespace(decoder_start_token_id=9, pad_token_id=9)

    def forward(self, input_ids: Any, attention_mask: Any = None, logits_to_keep: Any = None,
                decoder_input_ids: Any = None) -> Any:  # fmt: skip
        self.asked, self.decoder_input_ids = logits_to_keep, decoder_input_ids
        kept = self.answer if logits_to_keep is None else self.answer[:, logits_to_keep]
        return SimpleNamespace(logits=kept)


def learner(logits: torch.Tensor, kind: Kind, head: Head) -> Learner:
    module = Fixed(logits)
    return Learner(module, module, None, kind, head, Blocks((), frozenset(), ()))


def logit(p: float) -> list[float]:
    """Scores of two classes with probability p for class 1."""
    return [0.0, math.log(p / (1 - p))]


def test_next_token_scores_each_label_by_the_column_before_it() -> None:
    """Closed form: p(1) is 0.9 after the first token and 0.2 after the second; labels ., 1, 0."""
    logits = torch.tensor([[logit(0.9), logit(0.2), logit(0.5)]])
    batch = {"input_ids": torch.tensor([[5, 1, 0]]), "labels": torch.tensor([[IGNORED, 1, 0]])}
    objective = registry.load("objective", "next_token")()
    loss = objective.loss(learner(logits, "decoder", "causal"), batch)
    assert float(loss) == pytest.approx(-math.log(0.9) - math.log(0.8))
    assert objective.targets(batch) == 2


def test_next_token_of_an_encoder_decoder_scores_each_label_in_its_own_column() -> None:
    """Closed form; the decoder sees the labels moved by one behind the start token."""
    logits = torch.tensor([[logit(0.9), logit(0.2), logit(0.5)]])
    batch = {"input_ids": torch.tensor([[5]]), "labels": torch.tensor([[1, 0, IGNORED]])}
    model = learner(logits, "encoder_decoder", "seq2seq")
    loss = registry.load("objective", "next_token")().loss(model, batch)
    assert float(loss) == pytest.approx(-math.log(0.9) - math.log(0.8))
    assert model.module.decoder_input_ids.tolist() == [[9, 1, 0]]  # type: ignore[union-attr]


def test_classification_is_the_cross_entropy_of_the_class() -> None:
    """Closed form: two rows."""
    logits = torch.tensor([logit(0.9), logit(0.2)])
    batch = {"input_ids": torch.tensor([[5], [6]]), "labels": torch.tensor([[1], [1]])}
    objective = registry.load("objective", "classification")()
    model = learner(logits, "encoder", "classification")
    assert float(objective.loss(model, batch)) == pytest.approx(-math.log(0.9) - math.log(0.2))
    first, second = objective.predict(model, batch, None)
    assert (first.value, second.value) == (1, 0)
    assert first.remarks["log_likelihood"] == pytest.approx(math.log(0.9))
    assert second.remarks["log_likelihood"] == pytest.approx(math.log(0.2))


def test_label_words_ask_only_for_the_answers_columns() -> None:
    """Closed form: rows of lengths 2 and 3 (padded); the word is scored one column before it."""
    none = logit(0.5)
    logits = torch.tensor([[logit(0.9), none, none, none], [none, logit(0.3), none, none]])
    labels = torch.tensor([[IGNORED, YES, IGNORED, IGNORED], [IGNORED, IGNORED, NO, IGNORED]])
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": labels}
    model = learner(logits, "decoder", "causal")
    objective = registry.load("objective", "label_words")(words=("no", "yes"))
    loss = objective.loss(model, batch)
    assert float(loss) == pytest.approx(-math.log(0.9) - math.log(0.7))
    assert model.module.asked.tolist() == [0, 1]  # type: ignore[union-attr]


def test_label_words_of_a_masked_model_are_scored_at_the_mask() -> None:
    """Closed form."""
    logits = torch.tensor([[logit(0.5), logit(0.8), logit(0.5)]])
    batch = {
        "input_ids": torch.ones(1, 3, dtype=torch.long),
        "labels": torch.tensor([[IGNORED, YES, IGNORED]]),
    }
    objective = registry.load("objective", "label_words")(words=("no", "yes"))
    loss = objective.loss(learner(logits, "encoder", "masked"), batch)
    assert float(loss) == pytest.approx(-math.log(0.8))
