"""Make the outputs of the frozen lowest blocks once, keep them on disk, and begin above them.

Paper: AutoFreeze: Automatically Freezing Model Blocks to Accelerate Fine-tuning, Liu et al. 2021
(section 4, storage manager). https://arxiv.org/abs/2102.01386

Departs from the paper: what is frozen is chosen before the run and stays so; all rows are made
before the first update, in one file of which only what a batch needs is read.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lowres.core.errors import InputError, Problem
from lowres.core.parts import Lever, part
from lowres.core.rotation import Rotating

if TYPE_CHECKING:
    from lowres.core.batching import Batching
    from lowres.core.example import Batch, Row
    from lowres.core.learner import Learner
    from lowres.core.recipe import Recipe

COLUMN = "prefix_place"
"""Of a batch: each token's place among those of all training rows; 0 where there is padding."""


@part
class FrozenPrefixCache(Lever):
    """It saves the time of the frozen blocks in every update, and takes disk: one vector a token.

    The file lies under `LOWRES_CACHE` (else in the user's cache folder) and is found again by a
    digest of the frozen weights, the configuration, the rows, the tokenizer and the versions; runs
    that differ in what is trained above, in seeds or in rates share it. Evaluation goes through all
    blocks. Frozen weights stay where they are; `frozen_offload` moves them out of the way.

    Losses are equal to rounding: matrix products add up in another order when rows are padded to
    another length. There must be no dropout in the frozen part: set `model.dropout` to 0.
    """

    effect: ClassVar[Literal["exact", "lossy"]] = "exact"
    # It saves time, on rows that come again, and no bytes.
    searched: ClassVar[int | None] = None
    sample_recipe: ClassVar[Mapping[str, Any]] = {"freezing": {"name": "prefix", "frozen": 1}}

    def check(self, recipe: Recipe) -> Iterator[str]:
        if recipe.freezing.name == "none":
            yield (
                "without freezing the lowest block is trained, and its outputs change; freeze from "
                "the input (freezing: {name: prefix, frozen: N}), or drop the lever"
            )
        if isinstance(recipe.freezing, Rotating):
            yield (
                f"freezing '{recipe.freezing.name}' changes while it runs what is frozen; use "
                "freezing 'prefix', or drop the lever"
            )
        for lever in recipe.levers:
            if "divided" in lever.brought():
                yield (
                    f"'{lever.name}' holds the frozen weights in parts, and they name the file; "
                    "let it keep them whole (stage 2), or drop one of the two"
                )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            yield "it makes its file in one process; start one process, or drop the lever"

    def on_batching(self, batching: Batching) -> Batching:
        def group(rows: Sequence[Row], size: int) -> list[list[Row]]:
            return batching.group(_placed(rows), size)

        def collate(rows: Sequence[Row], pad_id: int, side: Literal["left", "right"]) -> Batch:
            return batching.collate(_placed(rows), pad_id, side)

        return dataclasses.replace(batching, group=group, collate=collate)

    def on_rows(self, recipe: Recipe, learner: Learner, rows: Sequence[Row]) -> None:
        from lowres.bridges import prefix_cache
        from lowres.core.paths import cache_folder
        from lowres.levers._prefix_states import PrefixStates

        if learner.kind == "vision":
            text = "knows rows by their token ids, and images have none; drop the lever"
            raise InputError("the recipe", [Problem("levers", f"'{self.name}' {text}")])
        prefix = prefix_cache.frozen_prefix(learner)
        side = recipe.objective.padding_side("train", recipe.task, learner.kind)
        folder = cache_folder() / "frozen_prefix"
        states = PrefixStates(prefix, learner, rows, side, recipe.budget.disk_gib, folder)
        prefix_cache.begin_above(prefix, COLUMN, states)


def _placed(rows: Sequence[Row]) -> list[Row]:
    """Rows with their tokens' places as a column; as they are where one is no training row."""
    if any(row.start is None or COLUMN in row.inputs for row in rows):
        return list(rows)
    return [
        dataclasses.replace(
            row, inputs={**row.inputs, COLUMN: range(row.start or 0, (row.start or 0) + row.length)}
        )
        for row in rows
    ]
