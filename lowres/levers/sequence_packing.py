"""Lay the rows of a micro-batch end to end in one row without padding; attention stays in a row.

Paper: Efficient Sequence Packing without Cross-contamination, Krell et al. 2021.
https://arxiv.org/abs/2107.02027

Departs from the paper: rows are not chosen to fill packs, which would change the global batch; a
micro-batch is as long as its rows are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from lowres.core.errors import InputError, Problem
from lowres.core.parts import Circumstance, Lever, PositiveInt, part

if TYPE_CHECKING:
    from lowres.core.batching import Batching
    from lowres.core.example import Batch, Row
    from lowres.core.learner import Learner, LoadRequest
    from lowres.core.recipe import Recipe

NEAREST = "use 'length_bucketing', which pads little, or drop the lever"


@part
class SequencePacking(Lever):
    """The batch is (1, T), T the sum of the rows' lengths, with positions (1, T) that begin anew in
    each row; the mask is made of them. Evaluation is padded as without.

    It saves what padding takes. With `model.attention: flash_attention_2` borders are given to the
    kernel; else a mask (1, 1, T, T) is written out, which for long micro-batches of even lengths
    may take more than padding did.

    Args:
        max_tokens: Longest packed row in tokens; a micro-batch ends before the row that would not
            fit. None: as many rows as `loop.micro_batch_size` says, at most its product with
            `loop.max_length` tokens.
    """

    brings: ClassVar[frozenset[Circumstance]] = frozenset({"packed"})
    effect: ClassVar[Literal["exact", "lossy"]] = "exact"

    max_tokens: PositiveInt | None = None

    def check(self, recipe: Recipe) -> Iterator[str]:
        if not recipe.objective.by_token:
            yield (
                f"'{recipe.objective.name}' asks for something of each row, and packed rows are "
                f"one; {NEAREST}"
            )
        if self.max_tokens is not None and self.max_tokens < recipe.loop.max_length:
            yield (
                f"max_tokens {self.max_tokens} is less than one row may have; raise it to "
                f"loop.max_length {recipe.loop.max_length} or more"
            )
        most = recipe.loop.micro_batch_size * recipe.loop.max_length
        parts = (recipe.optimizer, *recipe.levers)
        one_pass = next((p.name for p in parts if "in_backward" in p.brought()), None)
        if self.max_tokens is not None and self.max_tokens < most and one_pass:
            yield (
                f"max_tokens {self.max_tokens} cuts a micro-batch of up to {most} tokens into "
                f"several, and '{one_pass}' updates in the backward pass of one; set max_tokens to "
                "null, or lower loop.micro_batch_size and loop.global_batch_size"
            )
        if recipe.model.trust_remote_code:
            yield (
                "code that comes with a checkpoint need not keep packed rows apart; set "
                f"model.trust_remote_code to false, {NEAREST}"
            )

    def alone(self) -> str:
        if self.max_tokens is None:
            return ""
        return "would cut other numbers of micro-batches for each; set max_tokens to null"

    def on_load(self, request: LoadRequest) -> LoadRequest:
        if request.head != "causal":
            raise _refusal("it needs a decoder, whose tokens see those before them in their row")
        return request

    def on_learner(self, learner: Learner) -> Learner:
        from lowres.bridges import packing

        why = packing.separate(learner.base)
        if why is not None:
            raise _refusal(why)
        return learner

    def on_batching(self, batching: Batching) -> Batching:
        def group(rows: Sequence[Row], size: int) -> list[list[Row]]:
            groups = batching.group(rows, size)
            return [piece for group in groups for piece in self._cut(group)]

        def collate(rows: Sequence[Row], pad_id: int, side: Literal["left", "right"]) -> Batch:
            return _pack(rows)

        return dataclasses.replace(batching, group=group, collate=collate, tokens=sum)

    def _cut(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Consecutive rows of at most `max_tokens` tokens together."""
        taken: list[Row] = []
        for row in rows:
            room = self.max_tokens is None or (
                sum(r.length for r in taken) + row.length <= self.max_tokens
            )
            if taken and not room:
                yield taken
                taken = []
            taken.append(row)
        if taken:
            yield taken


def _pack(rows: Sequence[Row]) -> Batch:
    """Rows to one: `input_ids`, `position_ids`, `labels` and what else they carry, each (1, T)."""
    import torch

    from lowres.core.example import IGNORED

    # Without a mask: transformers looks for the borders of packed rows only where none is given.
    columns = {
        key: [value for row in rows for value in row.inputs[key]]
        for key in rows[0].inputs
        if key != "attention_mask"
    }
    columns["position_ids"] = [at for row in rows for at in range(row.length)]
    # Nothing in its row comes before the first token; what does in the packed one is another row's.
    columns["labels"] = [v for row in rows for v in (IGNORED, *row.labels[1:])]
    return {key: torch.tensor([values], dtype=torch.long) for key, values in columns.items()}


def _refusal(why: str) -> InputError:
    return InputError("the recipe", [Problem("levers", f"'sequence_packing': {why}; {NEAREST}")])
