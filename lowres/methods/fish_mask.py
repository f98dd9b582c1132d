"""Train the single weights that carry most Fisher information, all others frozen.

Paper: Training Neural Networks with Fixed Sparse Masks, Sung et al. 2021.
https://arxiv.org/abs/2111.09839

Departs from the paper: the weights of linear layers in blocks may be chosen, not norms, biases and
embeddings; the gradient is that of a row's mean loss over its target tokens, dropout off; the
change is held beside the weights, so that these may lie in 4 or 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import Circumstance, PositiveInt, part
from lowres.methods._entries import ShareOfWeights, Sparse

if TYPE_CHECKING:
    import torch

    from lowres.core.learner import Learner
    from lowres.core.sample import Sample


@part
class FishMask(Sparse):
    """F = the mean over rows of the squared gradient of a row; the highest of all matrices train.

    While it chooses, host memory holds one float for each weight that may be chosen, and the
    device the activations of one row. Training costs about the arithmetic of full fine-tuning, and
    keeps the input of every layer that was chosen from.

    Args:
        share: Of the weights, that train; a budget of the whole model.
        targets: `all-linear`, `paper` (queries and values), or layer names joined by `+`.
        rows: Training rows to look at, one at a time; all where there are fewer.
    """

    taxonomy: ClassVar[Taxonomy] = "selective"
    # The paper: 5e-5 for BERT-large, 3e-4 for T0.
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-5, 3e-4)
    mergeable: ClassVar[bool] = True
    refuses: ClassVar[Mapping[Circumstance, str]] = {
        "rotating": "the budget is the whole model's, so that a block may have nothing to train in "
        "its turn; use 'sam_choice', which trains in every matrix"
    }

    share: ShareOfWeights = 0.005
    targets: str = "all-linear"
    rows: PositiveInt = 1024

    def observe(self, learner: Learner, sample: Sample) -> Mapping[str, torch.Tensor]:
        from lowres.methods import _entries

        paths = self.paths(learner.base, learner.blocks)
        return _entries.sums(learner, sample, sample.batches(self.rows, size=1), paths, power=2)

    def decide(self, scores: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        from lowres.methods import _entries

        _entries.stop_at_infinite(self.name, scores)
        _entries.stop_at_nothing(self.name, scores)
        # As many as are expected, which rounds matrix by matrix.
        count = sum(_entries.floor(self.share, scored.numel()) for scored in scores.values())
        return _entries.highest(scores, count)
