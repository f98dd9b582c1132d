"""Make the logits of a few tokens at a time, and once more in the backward pass.

Paper: Cut Your Losses in Large-Vocabulary Language Models, Wijmans et al. 2024.
https://arxiv.org/abs/2411.09009

Departs from the paper: slices of tokens with torch's kernels, not one fused kernel, so that a slice
of logits is in memory, once. torch 2.13's `linear_cross_entropy` and Liger's kernel are not used:
docs/decisions/0014.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from lowres.core.errors import InputError
from lowres.core.example import IGNORED, Batch
from lowres.core.learner import Learner, forward_arguments, wide
from lowres.core.parts import Circumstance, Lever, PositiveInt, part

if TYPE_CHECKING:
    import torch

    from lowres.core.recipe import Recipe

_NOTHING = "there are no logits over a vocabulary to cut"


@part
class ChunkedLogits(Lever):
    """No (tokens, vocabulary) tensor is held; positions without a target never have logits at all.

    Args:
        chunk: Target tokens whose logits (chunk, V) are there at a time.
    """

    brings: ClassVar[frozenset[Circumstance]] = frozenset({"chunked"})
    effect: ClassVar[Literal["exact", "lossy"]] = "exact"
    searched: ClassVar[int | None] = 1

    chunk: PositiveInt = 256

    def check(self, recipe: Recipe) -> Iterator[str]:
        if set(recipe.objective.heads.values()) == {"classification"}:
            yield (
                f"objective '{recipe.objective.name}' puts a classification head on the model: "
                f"{_NOTHING}; drop the lever, or use the objective next_token or label_words"
            )

    def on_learner(self, learner: Learner) -> Learner:
        from lowres.bridges import heads, peft

        if learner.head == "classification":
            raise InputError("the recipe", [f"lever '{self.name}': {_NOTHING}; drop it"])
        heads.head_of(peft.unwrap_adapted(learner.base))
        own = {name: getattr(learner, name) for name in Learner.__dataclass_fields__}
        return ChunkedLearner(**own, chunk=self.chunk)


@dataclass
class ChunkedLearner(Learner):
    """A learner of a language model that makes logits only where and when they are asked for."""

    chunk: int = 256

    only_targets = True

    def logits(self, batch: Batch, positions: torch.Tensor | None = None) -> torch.Tensor:
        if positions is None or "logits_to_keep" in forward_arguments(self.base):
            return super().logits(batch, positions)
        hidden_BTD, head, tail = self._body(batch)
        return cast("torch.Tensor", tail(head(hidden_BTD[:, positions])))

    def token_logprobs(self, batch: Batch) -> torch.Tensor:
        import torch
        from torch.nn import functional as F
        from torch.utils.checkpoint import checkpoint

        from lowres.levers._logprobs import overwriting_logprobs
        from lowres.levers._summed import used_in_slices

        labels = batch["labels"]
        if self.head == "causal":
            labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        labels_N = labels.reshape(-1)
        # The host waits for a count that a device makes; before the body there is nothing else.
        targets_K = (labels_N != IGNORED).nonzero()[:, 0]
        hidden_BTD, head, tail = self._body(batch)
        hidden_KD = hidden_BTD.flatten(0, 1).index_select(0, targets_K)
        del hidden_BTD

        slices = [torch.split(x, self.chunk) for x in (hidden_KD, labels_N[targets_K])]
        score = used_in_slices(head, len(slices[0]), hidden_KD.device)

        def logprobs(hidden: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
            return overwriting_logprobs(wide(tail(score(hidden))), words)

        found = []
        for hidden, words in zip(*slices, strict=True):
            if torch.is_grad_enabled():
                found.append(checkpoint(logprobs, hidden, words, use_reentrant=False))
            else:
                found.append(logprobs(hidden, words))
        together = torch.cat(found)
        return together.new_zeros(labels_N.shape).index_copy(0, targets_K, together)

    def _body(self, batch: Batch) -> tuple[torch.Tensor, Any, Any]:
        """Hidden states (B, T, D) before the head, the head, and what is done to its logits."""
        import torch

        from lowres.bridges import heads, peft

        inner: Any = peft.unwrap_adapted(self.base)
        tail = heads.tail_of(inner)
        with heads.taken(inner) as stand_in:
            made = super().logits(batch)
        assert stand_in.hidden is not None and stand_in.probe is not None
        if torch.is_grad_enabled():
            heads.stop_at_unknown_tail(inner, stand_in.probe, made, tail(stand_in.probe))
        hidden_BTD = stand_in.hidden
        tokens = batch["input_ids"].shape[1]
        if self.head != "seq2seq" and hidden_BTD.shape[1] > tokens:
            hidden_BTD = hidden_BTD[:, -tokens:]  # vectors of a soft prompt come first
        return hidden_BTD, stand_in.head, tail
