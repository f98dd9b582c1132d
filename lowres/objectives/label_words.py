"""A pattern around the text and a word for each label, scored by the language-model head.

Paper: Exploiting Cloze Questions for Few Shot Text Classification, Schick and Schuetze 2020
(section 3). https://arxiv.org/abs/2001.07676

Departs from the paper: one pattern, no auxiliary loss; for decoders the word follows the pattern,
as in Few-shot Fine-tuning vs. In-context Learning, Mosbach et al. 2023,
https://arxiv.org/abs/2305.16938.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lowres.core.errors import InputError, Problem
from lowres.core.example import IGNORED, Asks, Batch, Example, Prediction, Purpose, Row
from lowres.core.parts import Objective, Task, part

if TYPE_CHECKING:
    import torch

    from lowres.core.learner import Encoder, Head, Kind, Learner
    from lowres.core.recipe import Recipe

MASK = "{mask}"
LONG_WORD = 20
"""Letters: a space farther back is not where a word begins."""


@part
class LabelWords(Objective):
    """No new weights: the pretrained head answers from the first update on.

    Only the logits of the answer's column are made, (B, V) instead of (B, T, V), where the model
    can.

    Args:
        pattern: With `{text}`, `{pair}`, and for masked models `{mask}` (put at the end when
            absent). None takes the task's.
        words: One for each label, each a single token as it follows the pattern (mind the leading
            space). None takes the task's.
    """

    heads: ClassVar[Mapping[Kind, Head]] = {
        "decoder": "causal",
        "encoder": "masked",
        "encoder_decoder": "seq2seq",
    }
    serves: ClassVar[frozenset[Asks]] = frozenset({"label"})

    pattern: str | None = None
    words: tuple[str, ...] | None = None

    def check(self, recipe: Recipe) -> Iterator[str]:
        words = self.words or recipe.task.label_words
        if len(words) != len(recipe.task.labels):
            yield f"{len(words)} words {list(words)} for the labels {list(recipe.task.labels)}"
        elif len(set(words)) != len(words):
            yield f"the words {list(words)} are not all different"
        if "{text}" not in (self.pattern or recipe.task.pattern):
            yield f"the pattern {self.pattern!r} has no {{text}}"

    def rows(
        self, task: Task, examples: Sequence[Example], encoder: Encoder, purpose: Purpose
    ) -> list[Row]:
        words = self.words or task.label_words
        ids = word_ids(words, encoder.tokenizer)
        pattern = self.pattern or task.pattern
        if encoder.kind != "encoder" and MASK in pattern:
            why = f"the pattern {pattern!r} has a {MASK}, and a(n) {encoder.kind} has none to fill"
            raise InputError("the recipe", [Problem("objective.pattern", why)])
        if encoder.kind == "encoder":
            mask = encoder.tokenizer.mask_token
            pattern = pattern if MASK in pattern else f"{pattern} {MASK}"
            pattern = pattern.replace(MASK, mask)
        return [self._row(e, pattern, ids, encoder) for e in examples]

    def _row(self, example: Example, pattern: str, ids: list[int], encoder: Encoder) -> Row:
        inputs, cut = _fit(example, pattern, encoder)
        assert example.label is not None
        word = ids[example.label]
        if encoder.kind == "encoder_decoder":
            return Row(example.id, {"input_ids": inputs}, [word], truncated=cut)
        if encoder.kind == "decoder":
            # The answer stands in the row as it does in generation: behind the pattern.
            inputs = [*inputs, word]
            labels = [IGNORED] * (len(inputs) - 1) + [word]
        else:
            labels = [IGNORED] * len(inputs)
            labels[inputs.index(encoder.tokenizer.mask_token_id)] = word
        return Row(example.id, {"input_ids": inputs}, labels, truncated=cut)

    def targets(self, batch: Batch) -> int:
        return int(batch["labels"].shape[0])

    def loss(self, learner: Learner, batch: Batch) -> torch.Tensor:
        from torch.nn import functional as F

        scores_BV, words_B = _answers(learner, batch)
        return F.cross_entropy(scores_BV, words_B, reduction="sum")

    def predict(self, learner: Learner, batch: Batch, task: Task) -> list[Prediction]:
        scores_BV, _ = _answers(learner, batch)
        ids = word_ids(self.words or task.label_words, learner.tokenizer)
        best = scores_BV[:, ids].argmax(-1).tolist()
        outside = scores_BV.argmax(-1).tolist()
        return [
            Prediction(int(label), {"off_vocabulary": float(top not in ids)})
            for label, top in zip(best, outside, strict=True)
        ]


def word_ids(words: Sequence[str], tokenizer: Any) -> list[int]:
    """The token of each label word. Raises InputError for words of several tokens."""
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    # A sentence-piece or word-piece tokenizer drops or marks the space itself.
    ids = [i if len(i) == 1 else tokenizer(w.strip(), add_special_tokens=False)["input_ids"]
           for i, w in zip(ids, words, strict=True)]  # fmt: skip
    broken = [
        f"the word {w!r} is {len(i)} tokens {tokenizer.convert_ids_to_tokens(i)}"
        for w, i in zip(words, ids, strict=True)
        if len(i) != 1
    ]
    flat = [i[0] for i in ids if len(i) == 1]
    if len(set(flat)) != len(flat):
        broken.append(f"the words {list(words)} are not different tokens: {flat}")
    if broken:
        hint = "; choose words that are one token each"
        raise InputError("the recipe", [Problem("objective.words", b + hint) for b in broken])
    return flat


def _answers(learner: Learner, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores at the answer's position (B, V) in float32, and the word's id (B,)."""
    import torch

    from lowres.core.learner import wide

    labels = batch["labels"]
    column_B = (labels != IGNORED).int().argmax(-1)
    words_B = labels.gather(1, column_B[:, None])[:, 0]
    if learner.kind == "encoder_decoder":
        return wide(learner.logits(batch)[:, 0]), words_B
    if learner.kind == "decoder":
        # The label stands one behind the pattern's last token, which is the position asked.
        column_B = column_B - 1
    columns_U, place_B = torch.unique(column_B, return_inverse=True)
    logits_BUV = learner.logits(batch, columns_U)
    rows_B = torch.arange(labels.shape[0], device=labels.device)
    return wide(logits_BUV[rows_B, place_B]), words_B


def _fit(example: Example, pattern: str, encoder: Encoder) -> tuple[list[int], int]:
    """Token ids of the filled pattern; the end of the longer text is cut until it fits.

    The pattern itself, where the answer is read off, is never cut.
    """
    # A decoder's answer follows the pattern; its own column must fit as well.
    limit = encoder.max_length - (1 if encoder.kind == "decoder" else 0)
    texts = {"text": example.text, "pair": example.pair or ""}
    whole = 0
    while True:
        filled = pattern
        for key, value in texts.items():
            filled = filled.replace("{" + key + "}", value)
        ids = list(encoder.tokenizer(filled, verbose=False)["input_ids"])  # cut below: no warning
        eos = encoder.tokenizer.eos_token_id
        if encoder.kind == "decoder" and len(ids) > 1 and ids[-1] == eos:
            ids.pop()
        whole = whole or len(ids)
        over = len(ids) - limit
        if over <= 0:
            return ids, whole - len(ids)
        longer = max(texts, key=lambda key: len(texts[key]))
        if not texts[longer]:
            raise InputError(
                "the recipe",
                [
                    Problem(
                        "loop.max_length",
                        f"{encoder.max_length} is shorter than the pattern {pattern!r} alone "
                        f"({len(ids)} tokens)",
                    )
                ],
            )
        texts[longer] = _shorter(texts[longer], over / len(ids))


def _shorter(text: str, share: float) -> str:
    """Without its end: half of a share of its letters, so that more is never cut than must be, and
    at least one; back to a space where one is near, which not every script has."""
    kept = min(len(text) - 1, round(len(text) * (1 - share / 2)))
    border = text.rfind(" ", 0, kept + 1)
    return text[: border if border > 0 and kept - border <= LONG_WORD else kept]
