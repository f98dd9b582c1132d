"""Train the blocks whose weights carry most Fisher information.

Paper: Training Neural Networks with Fixed Sparse Masks, Sung et al. 2021, equations 3 and 4 (the
empirical Fisher information). https://arxiv.org/abs/2111.09839

Departs from the paper: it chooses single weights; here whole blocks, by the mean over their
weights.
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
class Fisher(Highest):
    """score = the mean over rows and over a block's weights of the squared gradient of a row.

    Args:
        trained: Blocks to train.
        rows: Training rows to look at, one at a time.
    """

    sample_fields: ClassVar[Mapping[str, Any]] = {"trained": 1}

    trained: PositiveInt
    rows: PositiveInt = 32

    def scores(self, learner: Learner, sample: Sample) -> torch.Tensor:
        from lowres.freezing import _gradients

        rows = sample.batches(self.rows, size=1)
        squares = _gradients.mean_norms(learner, sample, rows, power=2)
        counts, _ = _gradients.sizes(learner)
        return squares / counts
