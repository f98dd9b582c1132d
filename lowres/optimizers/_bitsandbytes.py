"""What the optimizers share that hold their states in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lowres.core.parts import Optimizer, PositiveFloat, part
from lowres.optimizers._adam import EMBEDDING, Beta
from lowres.optimizers._decay import decays

if TYPE_CHECKING:
    import torch
    from torch import nn


@part
class BlockwiseAdamw(Optimizer):
    """AdamW whose two states are held in 8 bits, with a scale for each 256 elements.

    Held in 32 bits: the states of embedding tables (as in the paper's stable embedding layer and in
    transformers' Trainer: rare tokens make their gradients uneven) and of tensors under 4,096
    elements (as bitsandbytes does).

    Args:
        lr: Peak learning rate; the schedule scales it.
    """

    sample_fields: ClassVar[Mapping[str, Any]] = {"lr": 1e-3}
    refuses: ClassVar[Mapping[Literal["in_backward", "on_host", "divided"], str]] = {
        "on_host": "holds states in 8 bits for the device's own kernels, and the host would take "
        "seconds for what they do in milliseconds; use adamw with this lever, or drop the lever",
        "divided": "keeps its states on the device in its own form; use adamw with this lever",
    }
    variant: ClassVar[Literal["AdamW8bit", "PagedAdamW8bit"]]

    lr: PositiveFloat
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0

    def make(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        from lowres.bridges import eight_bit_states

        groups: dict[tuple[int, float], list[nn.Parameter]] = {}
        for name, parameter in parameters:
            bits = 32 if EMBEDDING.search(name) else 8
            decay = self.weight_decay if decays(parameter) else 0.0
            groups.setdefault((bits, decay), []).append(parameter)
        return eight_bit_states.optimizer(
            self.variant,
            [
                {"params": group, "optim_bits": bits, "weight_decay": decay}
                for (bits, decay), group in groups.items()
            ],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
        )
