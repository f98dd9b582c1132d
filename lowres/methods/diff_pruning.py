"""Learn which weights to change by gates that a penalty closes, then prune to a share of them.

Paper: Parameter-Efficient Transfer Learning with Diff Pruning, Guo et al. 2020.
https://arxiv.org/abs/2012.07463

Departs from the paper: linear layers in blocks alone; no gates for groups; what is trained of a
gate is its shift over `gate_rate`, which stands for the larger learning rate of the authors;
pruning takes its place within the updates of the run; what is saved are changes and gates as they
are, not the few changes that are left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from lowres.core.errors import InputError, Problem
from lowres.core.method import Taxonomy
from lowres.core.parts import Circumstance, PositiveFloat, part
from lowres.methods._adapter import Adapter

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class DiffPruning(Adapter):
    """y = W x + (z o w) x, z hard concrete; loss + penalty E|z|_0. Then the largest |z w| of all
    matrices are kept and trained on.

    It takes more memory than full fine-tuning: two trained numbers for each weight, and what is
    made of them in each pass. It is here for comparison.

    Args:
        share: Of the weights, that are kept.
        penalty_weight: Of the expected number of open gates.
        log_alpha: Of every gate at the start.
        gate_rate: How many times faster a gate's log alpha is trained than a change.
        prune_at: After this share of the updates.
        targets: `all-linear`, `paper` (queries and values), or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "selective"
    # The paper: 1e-5 for BERT-large; the authors' code also 5e-5.
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-5, 5e-5)
    mergeable: ClassVar[bool] = True
    draws: ClassVar[bool] = True
    # At the default rate two updates close every gate, and nothing would be left to be merged.
    sample_fields: ClassVar[Mapping[str, Any]] = {"gate_rate": 1.0}
    # A gate that is surely open gets next to nothing from the data while its weight is zero.
    may_rest: ClassVar[str | None] = "shift_oi"
    refuses: ClassVar[Mapping[Circumstance, str]] = {
        "updated_apart": "it prunes between updates, and the next one would bring back what it "
        "pruned; use 'fish_mask'",
        "rotating": "it prunes all matrices at once, whatever their turns were; use freezing "
        "'prefix'",
        "tiled": "each slice of tokens would draw gates of its own; drop that lever",
    }

    share: Annotated[float, Field(gt=0, le=1)] = 0.005
    penalty_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.25e-7
    log_alpha: Annotated[float, Field(allow_inf_nan=False)] = 5.0
    # The authors train it at .1 and changes at 1e-5.
    gate_rate: PositiveFloat = 1e4
    prune_at: Annotated[float, Field(gt=0, lt=1)] = 0.5
    targets: str = "all-linear"

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.bridges import peft
        from lowres.core.delta import Piece
        from lowres.methods._gated import GatedDelta

        paths = peft.linear_paths(model, blocks, self.targets)
        settings = {"log_alpha": self.log_alpha, "gate_rate": self.gate_rate}
        return [Piece(GatedDelta, paths, settings)]

    def uneven(self) -> str | None:
        return "the penalty is one sum over all matrices" if self.penalty_weight else None

    def before_update(self, model: nn.Module, step: int, total: int) -> None:
        from lowres.methods import _entries

        if total < 2:
            raise InputError(
                "the recipe",
                [Problem("loop", "'diff_pruning' prunes between updates; make at least two")],
            )
        if step != self._pruned_before(total):
            return
        deltas = _deltas(model)
        count = _entries.floor(self.share, sum(d.change_oi.numel() for d in deltas))
        threshold = _entries.least_of_highest((d.usual().abs().flatten() for d in deltas), count)
        for delta in deltas:
            delta.prune(threshold)

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        import torch

        deltas = [d for d in _deltas(model) if d.shift_oi.requires_grad]
        if not self.penalty_weight or not deltas:
            return None
        # Gates that pruning has set give a number, and no gradient.
        return self.penalty_weight * torch.stack([d.expected_gates() for d in deltas]).sum()

    def _pruned_before(self, total: int) -> int:
        return max(1, int(self.prune_at * total))


def _deltas(model: nn.Module) -> list[Any]:
    from lowres.methods._gated import GatedDelta

    return [m for m in model.modules() if isinstance(m, GatedDelta)]
