"""Train the bias vectors alone: y = W x + (b + d), with d from zero.

Paper: BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models,
Ben-Zaken et al. 2021. https://arxiv.org/abs/2106.10199

Departs from the paper: the change d is held beside the frozen bias, so that several adapters can
share one base and be switched off; the update of d is the update of b.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lowres.core.errors import InputError, Problem
from lowres.core.method import Taxonomy
from lowres.core.parts import part
from lowres.methods._adapter import Adapter

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class Bitfit(Adapter):
    """Every `.bias`: attention, feed-forward, norms. No layer input is kept for backward."""

    searched: ClassVar[bool] = True
    taxonomy: ClassVar[Taxonomy] = "selective"
    # Section 3 of the paper: 1e-4 to 1e-3 for BERT.
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-4, 1e-3)
    mergeable: ClassVar[bool] = True

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.bridges import sites
        from lowres.core.delta import Piece
        from lowres.methods._bias import BiasDelta

        read = sites.read_by_kernels(model)
        biased = [
            path
            for path, module in model.named_modules()
            if "bias" in dict(module.named_parameters(recurse=False))
            and blocks.trains(f"{path}.bias")
            and not blocks.in_head(path)
            and path not in read
            # A bias of a module with children is a child's bias, tied (BERT's prediction head).
            and not any(module.children())
        ]
        if not biased:
            raise InputError(
                "the recipe",
                [
                    Problem(
                        "method",
                        f"'bitfit': {type(model).__name__} has no bias where the freezing allows "
                        "training; use lora, or a model with biases (BERT, RoBERTa, GPT-2, OPT)",
                    )
                ],
            )
        return [Piece(BiasDelta, biased)]
