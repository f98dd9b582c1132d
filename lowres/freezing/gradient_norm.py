"""Train the blocks whose gradients are largest beside their weights.

Paper: Surgical Fine-Tuning Improves Adaptation to Distribution Shifts, Lee et al. 2022, section 4.1
(Auto-RGN: the relative gradient norm of a layer). https://arxiv.org/abs/2210.11466

Departs from the paper: the paper scales each layer's learning rate by the norm in every epoch; here
it chooses blocks, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lowres.core.parts import PositiveInt, part
from lowres.freezing._highest import Highest

if TYPE_CHECKING:
    import torch

    from lowres.core.learner import Learner
    from lowres.core.sample import Sample


@part
class GradientNorm(Highest):
    """score = |g| / |w|, the mean over micro-batches; g is the gradient of the mean loss.

    Args:
        trained: Blocks to train.
        rows: Training rows to look at.
    """

    sample_fields: ClassVar[Mapping[str, Any]] = {"trained": 1}

    trained: PositiveInt
    rows: PositiveInt = 32

    def scores(self, learner: Learner, sample: Sample) -> torch.Tensor:
        from lowres.freezing import _gradients

        norms = _gradients.mean_norms(learner, sample, sample.batches(self.rows), power=1)
        _, weights = _gradients.sizes(learner)
        return norms / weights.sqrt()
