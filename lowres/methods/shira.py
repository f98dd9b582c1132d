"""Train a random few entries of each weight, as a sparse change beside it.

Paper: Sparse High Rank Adapters, Bhardwaj et al. 2024. https://arxiv.org/abs/2406.13175

Departs from the paper: the random mask alone (the paper also has structured, magnitude and
gradient masks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lowres.core.errors import InputError, Problem
from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveInt, part
from lowres.methods._adapter import Adapter

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class Shira(Adapter):
    """`y = W x + S x` with S sparse, from zero, at places drawn once; the places are saved.

    Layers of one shape have the same places, those that PEFT draws from the same seed. The input of
    every layer is kept for backward.

    Args:
        rank: As many entries as LoRA of this rank has parameters, rank (i + o).
        mask_seed: Of the places.
        targets: `paper` (queries and values), `all-linear`, or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "selective"
    # The range of lora.
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-5, 1e-3)
    mergeable: ClassVar[bool] = True
    sample_fields: ClassVar[Mapping[str, Any]] = {"rank": 2}

    rank: PositiveInt = 8
    mask_seed: int = 0
    targets: str = "all-linear"

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.bridges import peft
        from lowres.core.delta import Piece, features
        from lowres.methods._drawn import DrawnDelta

        alike: dict[int, list[str]] = {}
        for path in peft.linear_paths(model, blocks, self.targets):
            i, o = features(model.get_submodule(path))
            most = i * o // (i + o)
            if self.rank > most:
                text = (
                    f"'{self.name}' at {path}: rank {self.rank} asks for more entries than there "
                    f"are; set it to at most {most}"
                )
                raise InputError("the recipe", [Problem("method", text)])
            alike.setdefault(self.rank * (i + o), []).append(path)
        return [
            Piece(DrawnDelta, paths, {"n": count, "seed": self.mask_seed})
            for count, paths in alike.items()
        ]
