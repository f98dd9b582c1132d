"""Train every n-th block, counted from the output; the others and the embeddings are frozen.

Paper: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from lowres.core.parts import Circumstance, Freezing, part

if TYPE_CHECKING:
    from lowres.core.blocks import Blocks
    from lowres.core.learner import Learner
    from lowres.core.sample import Sample


@part
class Every(Freezing):
    """Gradients and optimizer states of the frozen blocks are saved; what backward needs to pass
    through them is kept down to the lowest trained block.

    Args:
        nth: The highest block trains, and each `nth` below it.
    """

    brings: ClassVar[frozenset[Circumstance]] = frozenset({"frozen_input"})
    sample_fields: ClassVar[Mapping[str, Any]] = {"nth": 2}

    nth: Annotated[int, Field(ge=2)]

    def blocks(self, learner: Learner, sample: Sample) -> Blocks:
        names = learner.blocks.names
        return learner.blocks.only(names[:: -self.nth], train_stem=False)
