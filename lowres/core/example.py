"""What a task hands out and what an objective makes of it.

Example (words or an image)  --objective.rows-->  Row (token ids)  --collate-->  Batch (tensors)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from lowres.core.images import Image, stacked

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Label of a position that no loss counts (torch's and transformers' convention)."""

Asks = Literal["label", "answer", "likelihood"]
"""What a task wants predicted: one of its labels, a text, or the likelihood of its own text."""

Purpose = Literal["train", "predict"]

Batch: TypeAlias = "dict[str, torch.Tensor]"
"""`input_ids`, `attention_mask` (B, T), `labels` (B, S), and what else the model takes. Without an
`attention_mask` every position is a real token. Of images `pixel_values` (B, C, H, W) in place of
`input_ids`; each patch is a token."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a data set, in words or as an image.

    Args:
        id: Unique within its task; ends up in the predictions file.
        text: The text, or the prompt of an answer; of an image a drawing of it in characters.
        pair: The second text of a pair.
        label: Index into the task's labels.
        answer: The text to be produced after `text`.
        image: What a vision model reads.
    """

    id: str
    text: str
    pair: str | None = None
    label: int | None = None
    answer: str | None = None
    image: Image | None = None


@dataclass(slots=True)
class Row:
    """One example as token ids.

    Args:
        id: The example's.
        inputs: Model arguments by name, each one a sequence of length T.
        labels: What the loss compares with: T ids with IGNORED where nothing is asked (causal), the
            ids of the target (sequence to sequence), or a single class.
        truncated: Tokens cut off so that it fits into `max_length`.
        start: Tokens of the training rows before it, in the data set's order; None of a row that is
            none of them.
        image: In place of `input_ids`; its tokens are told by `attention_mask`.
    """

    id: str
    inputs: dict[str, Sequence[int]]
    labels: Sequence[int]
    truncated: int = 0
    start: int | None = None
    image: Image | None = None

    @property
    def length(self) -> int:
        return len(self.inputs["input_ids" if self.image is None else "attention_mask"])


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was predicted for one row, and remarks that are averaged into the scores.

    Args:
        value: Of a label its index, of an answer the text; of a likelihood the negative logarithm,
            the tokens it is of, and all tokens of the row's text.
    """

    value: int | str | tuple[float, int, int]
    remarks: Mapping[str, float] = field(default_factory=dict)


def real_tokens(batch: Batch) -> int:
    """Tokens of a batch that are no padding."""
    mask = batch.get("attention_mask")
    return all_tokens(batch) if mask is None else int(mask.sum())


def all_tokens(batch: Batch) -> int:
    """Tokens of a batch, padding included."""
    return batch["input_ids" if "input_ids" in batch else "attention_mask"].numel()


def collate(rows: Sequence[Row], pad_id: int, side: Literal["left", "right"] = "right") -> Batch:
    """Pad rows to the longest and stack them.

    Args:
        rows: At least one.
        pad_id: The tokenizer's padding id. Which id it is has no influence on any loss: padding is
            masked by position, never by comparing ids, so a pad token that equals the end token is
            safe.
        side: `left` where the next token is read off the last column (generation).
    """
    import torch

    def stack(columns: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
        width = max(len(c) for c in columns)
        out = torch.full((len(columns), width), fill, dtype=torch.long)
        for i, column in enumerate(columns):
            start = width - len(column) if side == "left" else 0
            out[i, start : start + len(column)] = torch.as_tensor(column, dtype=torch.long)
        return out

    batch = {
        key: stack([row.inputs[key] for row in rows], pad_id if key == "input_ids" else 0)
        for key in rows[0].inputs
    }
    if "attention_mask" not in batch:
        batch["attention_mask"] = stack([[1] * row.length for row in rows], 0)
    images = [row.image for row in rows if row.image is not None]
    if images:
        batch["pixel_values"] = stacked(images)
    batch["labels"] = stack([row.labels for row in rows], IGNORED)
    return batch
