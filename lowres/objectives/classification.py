"""A fresh linear head over the text's or image's representation, cross-entropy over its labels.

Paper: BERT: Pre-training of Deep Bidirectional Transformers, Devlin et al. 2018 (section 4.1).
https://arxiv.org/abs/1810.04805

Departs from the paper: decoders are read at their last token (transformers' sequence
classification), vision transformers at their class token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from lowres.core.example import Asks, Batch, Example, Prediction, Purpose, Row
from lowres.core.parts import Objective, Task, part
from lowres.objectives._images import image_row

if TYPE_CHECKING:
    import torch

    from lowres.core.learner import Encoder, Head, Kind, Learner
    from lowres.core.recipe import Recipe


@part
class Classification(Objective):
    """Labels (B, 1) are class indices; logits are (B, C). Scored beside the task's metrics is
    `log_likelihood`, the mean logarithm of the right label's probability.
    """

    heads: ClassVar[Mapping[Kind, Head]] = {
        "encoder": "classification",
        "decoder": "classification",
        "encoder_decoder": "classification",
        "vision": "classification",
    }
    serves: ClassVar[frozenset[Asks]] = frozenset({"label"})

    def check(self, recipe: Recipe) -> Iterator[str]:
        if recipe.model.dtype == "float16":
            yield (
                "its new head would be trained in float16, where updates underflow; set "
                "model.dtype to float32 or bfloat16"
            )

    def rows(
        self, task: Task, examples: Sequence[Example], encoder: Encoder, purpose: Purpose
    ) -> list[Row]:
        if encoder.kind == "vision":
            return [image_row(example, encoder) for example in examples]
        rows = []
        for example in examples:
            texts = (example.text,) if example.pair is None else (example.text, example.pair)
            whole = encoder.tokenizer(*texts, verbose=False)  # cut below: no warning
            kept = encoder.tokenizer(*texts, truncation=True, max_length=encoder.max_length)
            inputs: dict[str, list[int]] = {key: list(c) for key, c in kept.items()}
            if encoder.kind == "encoder_decoder":
                _end(inputs, encoder)
            cut = max(0, len(whole["input_ids"]) - len(kept["input_ids"]))
            assert example.label is not None
            rows.append(Row(example.id, dict(inputs), [example.label], truncated=cut))
        return rows

    def targets(self, batch: Batch) -> int:
        return int(batch["labels"].shape[0])

    def loss(self, learner: Learner, batch: Batch) -> torch.Tensor:
        from torch.nn import functional as F

        from lowres.core.learner import wide

        scores = wide(learner.logits(batch))
        return F.cross_entropy(scores, batch["labels"][:, 0], reduction="sum")

    def predict(self, learner: Learner, batch: Batch, task: Task) -> list[Prediction]:
        from torch.nn import functional as F

        from lowres.core.learner import wide

        scores_BC = wide(learner.logits(batch))
        # It tells apart models that give the same labels.
        likely_B = F.log_softmax(scores_BC, -1).gather(1, batch["labels"])[:, 0]
        both = zip(scores_BC.argmax(-1).tolist(), likely_B.tolist(), strict=True)
        return [Prediction(int(c), {"log_likelihood": float(likely)}) for c, likely in both]


def _end(inputs: dict[str, list[int]], encoder: Encoder) -> None:
    """Make the row end with the end token: encoder-decoders are read at exactly one of them."""
    ids, end = inputs["input_ids"], encoder.tokenizer.eos_token_id
    if ids[-1] == end:
        return
    if len(ids) == encoder.max_length:
        ids[-1] = end
        return
    for key, column in inputs.items():
        column.append(end if key == "input_ids" else column[-1])
