"""Likelihood of the next token: of the answer given the prompt, or of the text itself.

Paper: Improving Language Understanding by Generative Pre-Training, Radford et al. 2018 (equation
1).

Departs from the paper: none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from lowres.core.example import IGNORED, Asks, Batch, Example, Prediction, Purpose, Row
from lowres.core.parts import Objective, PositiveInt, Task, part

if TYPE_CHECKING:
    import torch

    from lowres.core.learner import Encoder, Head, Kind, Learner


@part
class NextToken(Objective):
    """The mean is over target tokens of the whole global batch, so accumulation changes nothing.

    Args:
        max_new_tokens: Longest answer that is generated in evaluation.
    """

    heads: ClassVar[Mapping[Kind, Head]] = {"decoder": "causal", "encoder_decoder": "seq2seq"}
    serves: ClassVar[frozenset[Asks]] = frozenset({"answer", "likelihood"})
    by_token: ClassVar[bool] = True

    max_new_tokens: PositiveInt = 256

    def rows(
        self, task: Task, examples: Sequence[Example], encoder: Encoder, purpose: Purpose
    ) -> list[Row]:
        if task.asks == "likelihood":
            return [row for e in examples for row in _windows(e, encoder)]
        return [_answer(e, encoder, purpose) for e in examples]

    def targets(self, batch: Batch) -> int:
        labels = batch["labels"]
        # The first column of a causal row has no position before it to be predicted from; no row
        # begins with a target, since every row begins with a prompt or a start token.
        return int((labels != IGNORED).sum())

    def loss(self, learner: Learner, batch: Batch) -> torch.Tensor:
        return -learner.token_logprobs(batch).sum()

    def predict(self, learner: Learner, batch: Batch, task: Task) -> list[Prediction]:
        if task.asks == "likelihood":
            per_row = (
                learner.token_logprobs(batch).view(batch["labels"].shape).cpu().double().sum(-1)
            )
            counts = (batch["labels"] != IGNORED).sum(-1)
            started = learner.tokenizer.bos_token_id is not None
            texts = batch["attention_mask"].sum(-1) - int(started)
            if learner.kind == "encoder_decoder":
                texts = texts + counts
            all_rows = zip(per_row.tolist(), counts.tolist(), texts.tolist(), strict=True)
            return [Prediction((-logprob, count, text)) for logprob, count, text in all_rows]
        from lowres.bridges import transformers

        said = transformers.generate(learner.base, learner.tokenizer, batch, self.max_new_tokens)
        return [Prediction(text) for text in said]

    def longest(self, task: Task, max_length: int, kind: Kind) -> int:
        generates = task.asks == "answer" and kind == "decoder"
        return max_length + (self.max_new_tokens if generates else 0)

    def padding_side(self, purpose: Purpose, task: Task, kind: Kind) -> Literal["left", "right"]:
        generates = purpose == "predict" and task.asks == "answer"
        return "left" if generates and kind == "decoder" else "right"


def _windows(example: Example, encoder: Encoder) -> list[Row]:
    """Consecutive windows over a text; every token but the start of a window is a target."""
    ids = encoder.ids(example.text)
    start = encoder.tokenizer.bos_token_id
    lead = [start] if start is not None else []
    width = encoder.max_length - len(lead)
    rows = []
    for i, at in enumerate(range(0, len(ids), width)):
        window = lead + ids[at : at + width]
        if encoder.kind == "encoder_decoder":
            half = max(1, len(window) // 2)
            rows.append(Row(f"{example.id}.{i}", {"input_ids": window[:half]}, window[half:]))
        else:
            rows.append(Row(f"{example.id}.{i}", {"input_ids": window}, [IGNORED, *window[1:]]))
    return rows


def _answer(example: Example, encoder: Encoder, purpose: Purpose) -> Row:
    """Prompt, answer, end token; only the answer and the end token are targets."""
    tokenizer, limit = encoder.tokenizer, encoder.max_length
    prompt = list(tokenizer(example.text, verbose=False)["input_ids"])
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    target = encoder.ids(example.answer or "") + end
    if encoder.kind == "encoder_decoder":
        cut = max(0, len(prompt) - limit) + max(0, len(target) - limit)
        return Row(example.id, {"input_ids": prompt[:limit]}, target[:limit], truncated=cut)
    if prompt and end and prompt[-1:] == end:
        prompt = prompt[:-1]
    if purpose == "predict":
        # Keep the end of a long prompt: the question stands there.
        cut = max(0, len(prompt) - limit)
        return Row(example.id, {"input_ids": prompt[cut:]}, [IGNORED], truncated=cut)
    ids = (prompt + target)[:limit]
    labels = ([IGNORED] * len(prompt) + target)[:limit]
    return Row(
        example.id, {"input_ids": ids}, labels, truncated=len(prompt) + len(target) - len(ids)
    )
