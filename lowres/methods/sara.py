"""Train the smallest weights of each matrix, pulled together by a low rank, the others frozen.

Paper: SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation,
Hu et al. 2024. https://arxiv.org/abs/2409.06633

Departs from the paper: language models instead of diffusion; the threshold is a quantile of each
matrix's magnitudes instead of one for all; the matrices take their turn in the penalty in a
shuffled order; values keep their signs, which the authors' code takes away; what is no longer
trained after half time keeps its place in the optimizer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from lowres.core.method import Taxonomy
from lowres.core.parts import Circumstance, part
from lowres.methods._adapter import Adapter

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class Sara(Adapter):
    """y = W x + S x, S at the smallest |W|; loss + weight |(W + S) there|_*, one matrix an update.

    At half time the entries that have outgrown the threshold stay as they are, the others train on.
    The penalty makes a matrix of full size and its singular values in float32, which takes memory
    and time in every update; a weight of 0 leaves it out.

    Args:
        share: Of the weights of each matrix, that train.
        weight: Of the nuclear norm.
        targets: `all-linear`, `paper` (queries and values), or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "selective"
    # The authors' code: 1e-3 exp(-350 threshold), 5e-4 at their threshold of 2e-3.
    learning_rate_hint: ClassVar[tuple[float, float]] = (3e-4, 1e-3)
    mergeable: ClassVar[bool] = True
    refuses: ClassVar[Mapping[Circumstance, str]] = {
        "quantised": "a matrix in 4 or 8 bits has few different values, so that which weights are "
        "smallest is not known; hold it in 16 bits, or use 'fish_mask', which asks gradients",
        "divided": "it reads whole matrices, of which each process holds a part; use stage 2, or "
        "'fish_mask'",
        "rotating": "it settles weights at half time, whatever their turns were; use freezing "
        "'prefix'",
    }

    # 50 of 860 million in the paper's largest setting.
    share: Annotated[float, Field(gt=0, le=1)] = 0.058
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4
    targets: str = "all-linear"

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.bridges import peft
        from lowres.core.delta import Piece, features
        from lowres.methods._small import SmallDelta

        alike: dict[int, list[str]] = {}
        for path in peft.linear_paths(model, blocks, self.targets):
            size = math.prod(features(model.get_submodule(path)))
            alike.setdefault(max(1, int(self.share * size)), []).append(path)
        return [Piece(SmallDelta, paths, {"n": count}) for count, paths in alike.items()]

    def uneven(self) -> str | None:
        return "the penalty is on one matrix in each update" if self.weight else None

    def before_update(self, model: nn.Module, step: int, total: int) -> None:
        deltas = _deltas(model)
        if step == max(1, total // 2):
            for delta in deltas:
                delta.settle()
        turn = _order(len(deltas), [math.prod(d.shape) for d in deltas], step // len(deltas))
        for place, delta in enumerate(deltas):
            delta.penalised = place == turn[step % len(deltas)]

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        if not self.weight:
            return None
        (one,) = (delta for delta in _deltas(model) if delta.penalised)
        norm: torch.Tensor = one.nuclear_norm()
        return self.weight * norm


def _order(count: int, sizes: Sequence[int], cycle: int) -> list[int]:
    """In which order the matrices take their turns; two of the largest are the first of all, so
    that a plan, which traces two updates, sees what they take."""
    order = list(range(count))
    random.Random(cycle).shuffle(order)
    if cycle == 0:
        first = sorted(order, key=lambda place: -sizes[place])[:2]
        order = [*first, *(place for place in order if place not in first)]
    return order


def _deltas(model: nn.Module) -> list[Any]:
    from lowres.methods._small import SmallDelta

    return [m for m in model.modules() if isinstance(m, SmallDelta)]
