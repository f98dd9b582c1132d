"""Put rows of like length into the same micro-batch, so that little of it is padding.

Paper: none.

Departs from the paper: none. Buckets are made inside one update alone, which therefore trains on
the same rows as without; common loaders make them over the whole data set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from lowres.core.parts import Lever, part

if TYPE_CHECKING:
    from lowres.core.batching import Batching
    from lowres.core.example import Row


@part
class LengthBucketing(Lever):
    """The rows of an update go longest first: what runs out of memory does so at once.

    The gradient of the update is the same; dropout and drawn gates (diff_pruning) are others, as
    for another micro-batch. It saves time and the mean of memory; the peak is that of the longest
    rows, which now lie together. With one micro-batch an update it changes nothing.
    """

    effect: ClassVar[Literal["exact", "lossy"]] = "exact"

    def on_batching(self, batching: Batching) -> Batching:
        def group(rows: Sequence[Row], size: int) -> list[list[Row]]:
            return batching.group(sorted(rows, key=lambda row: -row.length), size)

        return dataclasses.replace(batching, group=group)
