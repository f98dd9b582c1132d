"""Train the weights and biases of the normalisation layers alone.

Paper: Strong Baselines for Parameter Efficient Few-Shot Fine-tuning, Basu et al. 2023.
https://arxiv.org/abs/2304.01917

Departs from the paper: language models instead of vision transformers; the attention is not scaled;
in a model of 16 bits the trained copies are of 16 bits, as PEFT has them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from lowres.core.errors import InputError, Problem
from lowres.core.method import Method, Taxonomy
from lowres.core.parts import part

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks


@part
class LnTuning(Method):
    """Every norm gets a trained copy in its own type, so in 16 bits updates below 2^-8 of a weight
    round away (`model.dtype` float32 with narrow matrices avoids it). No input of a matrix is kept
    for backward.
    """

    taxonomy: ClassVar[Taxonomy] = "selective"
    # 3e-4 with T0-3B in the paper of (IA)^3 (https://arxiv.org/abs/2205.05638); few parameters bear
    # more.
    learning_rate_hint: ClassVar[tuple[float, float]] = (3e-4, 1e-2)
    mergeable: ClassVar[bool] = True

    def apply(self, model: nn.Module, blocks: Blocks) -> nn.Module:
        from lowres.bridges import sites
        from lowres.bridges.peft_configs import inject_named

        norms = sites.norms(model, blocks)
        if not norms:
            text = (
                f"'ln_tuning': {type(model).__name__} has no norm where the freezing allows "
                "training; use lora, or freezing 'none'"
            )
            raise InputError("the recipe", [Problem("method", text)])
        adapted: nn.Module = inject_named(model, blocks, "LNTuningConfig", norms)
        return adapted

    def merge(self, model: nn.Module) -> nn.Module:
        from lowres.bridges import peft

        return peft.merge(model)
