"""Freeze the embeddings and the lowest blocks; backward ends at the lowest trained one.

Paper: What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning, Lee et al. 2019.
https://arxiv.org/abs/1911.03090

Departs from the paper: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lowres.core.errors import InputError, Problem
from lowres.core.parts import Circumstance, Freezing, PositiveInt, part

if TYPE_CHECKING:
    from lowres.core.blocks import Blocks
    from lowres.core.learner import Learner
    from lowres.core.sample import Sample


@part
class Prefix(Freezing):
    """The saving is in activations: below the lowest trained block nothing is kept for backward.

    Args:
        frozen: Blocks to freeze, counted from the input (an encoder-decoder's encoder comes first).
    """

    brings: ClassVar[frozenset[Circumstance]] = frozenset({"frozen_input"})
    sample_fields: ClassVar[Mapping[str, Any]] = {"frozen": 1}

    frozen: PositiveInt

    def blocks(self, learner: Learner, sample: Sample) -> Blocks:
        names = learner.blocks.names
        if self.frozen > len(names):
            raise InputError(
                "the recipe",
                [
                    Problem(
                        "freezing.frozen",
                        f"{self.frozen} is more than the {len(names)} blocks of the model",
                    )
                ],
            )
        return learner.blocks.only(names[self.frozen :], train_stem=False)
