"""Freeze the highest blocks and what lies above them; the lower blocks and the embeddings train.

Paper: Surgical Fine-Tuning Improves Adaptation to Distribution Shifts, Lee et al. 2022.
https://arxiv.org/abs/2210.11466

Departs from the paper: it freezes all blocks but one; here any number from the top.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lowres.core.errors import InputError, Problem
from lowres.core.parts import Freezing, PositiveInt, part

if TYPE_CHECKING:
    from lowres.core.blocks import Blocks
    from lowres.core.learner import Learner
    from lowres.core.sample import Sample


@part
class Suffix(Freezing):
    """For inputs unlike those of pretraining. Gradients and optimizer states of the frozen blocks
    are saved; backward must still go through them.

    Args:
        frozen: Blocks to freeze, counted from the output (an encoder-decoder's decoder first).
    """

    sample_fields: ClassVar[Mapping[str, Any]] = {"frozen": 1}

    frozen: PositiveInt

    def blocks(self, learner: Learner, sample: Sample) -> Blocks:
        names = learner.blocks.names
        if self.frozen >= len(names):
            text = f"{self.frozen} leaves none of the {len(names)} blocks of the model to train"
            raise InputError("the recipe", [Problem("freezing.frozen", text)])
        return learner.blocks.only(names[: -self.frozen], train_stem=True, train_top=False)
