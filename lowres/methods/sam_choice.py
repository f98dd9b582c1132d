"""Train the single weights of each matrix whose summed gradient is largest, the others frozen.

Paper: On the Effectiveness of Parameter-Efficient Fine-Tuning, Fu et al. 2022 (the second-order
approximation method, SAM). https://arxiv.org/abs/2211.15583

Departs from the paper: the weights of linear layers in blocks may be chosen, not norms, biases and
embeddings; dropout off while choosing; the change is held beside the weights, so that these may lie
in 4 or 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveInt, part
from lowres.methods._entries import ShareOfWeights, Sparse

if TYPE_CHECKING:
    import torch

    from lowres.core.learner import Learner
    from lowres.core.sample import Sample


@part
class SamChoice(Sparse):
    """score = |sum over batches of the gradient|, the highest of each matrix; chosen once, since
    the loss jumps where it is chosen again.

    While it chooses, host memory holds one float for each weight that may be chosen, and the
    device the activations of a micro-batch. Training costs about the arithmetic of full
    fine-tuning, and keeps the input of every layer that was chosen from.

    Args:
        share: Of the weights of each matrix, that train.
        targets: `all-linear`, `paper` (queries and values), or layer names joined by `+`.
        batches: Micro-batches to look at, fewer where there are fewer.
    """

    taxonomy: ClassVar[Taxonomy] = "selective"
    # The authors' code: 1e-4 for RoBERTa-base.
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-5, 3e-4)
    mergeable: ClassVar[bool] = True

    share: ShareOfWeights = 0.005
    targets: str = "all-linear"
    batches: PositiveInt = 600

    def observe(self, learner: Learner, sample: Sample) -> Mapping[str, torch.Tensor]:
        from lowres.methods import _entries

        paths = self.paths(learner.base, learner.blocks)
        batches = sample.batches(self.batches * sample.size)
        return _entries.sums(learner, sample, batches, paths, power=1)

    def decide(self, scores: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        from lowres.methods import _entries

        _entries.stop_at_infinite(self.name, scores)
        _entries.stop_at_nothing(self.name, scores)
        return _entries.highest_of_each({p: s.abs() for p, s in scores.items()}, self.share)
