"""A model as objectives see it, and what is needed to load and to encode for it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from lowres.core.example import IGNORED, Batch

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.blocks import Blocks

Kind = Literal["decoder", "encoder", "encoder_decoder", "vision"]
Head = Literal["causal", "masked", "classification", "seq2seq"]


@dataclass(frozen=True)
class LoadRequest:
    """What the bridge is asked to load; levers change it before anything is read.

    Args:
        checkpoint: As in the recipe.
        head: Which Auto class.
        labels: Number of classes of a classification head.
        matrices: What the matrices of linear and embedding layers are held in; None: as `dtype`.
        options: Further keyword arguments of `from_pretrained`, such as a quantisation config.
    """

    checkpoint: str
    revision: str | None
    head: Head
    labels: int
    dtype: str
    attention: str
    init: Literal["pretrained", "random"]
    trust_remote_code: bool
    matrices: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoder:
    """The tokenizer with the limits that rows must keep.

    Args:
        tokenizer: A transformers tokenizer; of a vision model an `ImageReader`.
        kind: Of the model the rows are for.
        max_length: Longest row in tokens.
    """

    tokenizer: Any
    kind: Kind
    max_length: int

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text without special tokens."""
        # verbose=False: a book is longer than the model's limit on purpose; it is cut into windows.
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return cast("list[int]", encoded["input_ids"])


@dataclass
class Learner:
    """The module and the ways to ask it. Levers replace it in `on_learner`;
    the engine wraps `module`.

    Args:
        module: What is called; under several processes the data-parallel wrapper.
        base: The model itself, never wrapped.
        tokenizer: Its tokenizer, or `ImageReader`.
        kind: decoder, encoder, encoder_decoder or vision.
        head: What its output is.
        blocks: The map of its parameters.
        remarks: What levers did that a reader of the record should know; the session says it.
    """

    module: nn.Module
    base: nn.Module
    tokenizer: Any
    kind: Kind
    head: Head
    blocks: Blocks
    remarks: list[str] = field(default_factory=list)

    only_targets = False  # Whether `token_logprobs` makes logits of positions with a target alone.

    def logits(self, batch: Batch, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Output scores: (B, T, V) of a language-model head, (B, C) of a classification head.

        Args:
            batch: Its `labels` are not passed on, except that an encoder-decoder's decoder inputs
                are made from them.
            positions: Columns (U,) to compute; the others' (B, T - U, V) logits are never made
                where the model can leave them out. The result is then (B, U, V).
        """
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        if self.head == "seq2seq":
            inputs["decoder_input_ids"] = self.decoder_inputs(batch["labels"])
        elif self.kind == "vision":
            # It tells how many tokens there are; no patch is padding.
            inputs.pop("attention_mask", None)
        keeps = "logits_to_keep" in forward_arguments(self.base)
        if self.head in ("causal", "masked") and prompted(self.base):
            return self._without_prompt(inputs, positions, keeps)
        if positions is None:
            return cast("torch.Tensor", self.module(**inputs).logits)
        if keeps:
            return cast("torch.Tensor", self.module(**inputs, logits_to_keep=positions).logits)
        return cast("torch.Tensor", self.module(**inputs).logits[:, positions])

    def _without_prompt(
        self, inputs: Batch, positions: torch.Tensor | None, keeps: bool
    ) -> torch.Tensor:
        """Logits of the row's own tokens, which are the last columns."""
        tokens = inputs["input_ids"].shape[1]
        wanted: Any = tokens if positions is None else positions - tokens
        if keeps:
            return cast("torch.Tensor", self.module(**inputs, logits_to_keep=wanted).logits)
        logits = cast("torch.Tensor", self.module(**inputs).logits)
        # One column where the head was taken away: there is nothing to be left out.
        if positions is None:
            return logits[:, -tokens:] if logits.shape[1] > tokens else logits
        return logits[:, wanted]

    def decoder_inputs(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (B, S) moved one to the right behind the start token,
        IGNORED replaced by padding.
        """
        config = cast("Any", self.base.config)
        start = config.decoder_start_token_id
        shifted = labels.new_full(labels.shape, start)
        shifted[:, 1:] = labels[:, :-1]
        return shifted.masked_fill(shifted == IGNORED, config.pad_token_id)

    def token_logprobs(self, batch: Batch) -> torch.Tensor:
        """Log-probability of each target token.

        Returns:
            A vector (N,) in float32 over B x S positions, 0 where the label is IGNORED. For a
            causal head the label at column t is scored by the logits of column t - 1.
        """
        from torch.nn import functional as F

        labels = batch["labels"]
        logits = self.logits(batch)
        if self.head == "causal":
            # Shifting the labels instead of the logits saves a (B, T - 1, V) copy.
            labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        flat = wide(logits).reshape(-1, logits.shape[-1])
        return -F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="none")


def wide(scores: torch.Tensor) -> torch.Tensor:
    """Scores in float32, or as they are when they are wider: a loss is never summed in 16 bits."""
    return scores.float() if scores.element_size() < 4 else scores


def prompted(model: nn.Module) -> bool:
    """Whether the model puts vectors of a soft prompt before the tokens of a row."""
    return hasattr(model, "prompt_encoder")


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """Argument names of the model's own forward (adapter wrappers take `*args, **kwargs`)."""
    unwrap = getattr(model, "get_base_model", None)
    inner = unwrap() if unwrap else model
    return frozenset(inspect.signature(type(inner).forward).parameters)
