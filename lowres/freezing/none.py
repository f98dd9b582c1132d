"""Freeze nothing: every block and the embeddings may be trained.

Paper: none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowres.core.parts import Freezing, part

if TYPE_CHECKING:
    from lowres.core.blocks import Blocks
    from lowres.core.learner import Learner
    from lowres.core.sample import Sample


@part
class NoFreezing(Freezing):
    """The method alone decides what is trained."""

    def blocks(self, learner: Learner, sample: Sample) -> Blocks:
        return learner.blocks
