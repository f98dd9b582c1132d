"""Keep optimizer states in host memory and compute the update there.

Paper: ZeRO-Offload: Democratizing Billion-Scale Model Training, Ren et al. 2021.
https://arxiv.org/abs/2101.06840

Departs from the paper: one device; gradients are copied in the update, not while the backward pass
goes on (with optimizer_in_backward they are); the update is torch's own, nothing is compiled; no
master copy unless asked for; parameters go to the host and come back, instead of a copy that stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from lowres.core.parts import Lever, part

if TYPE_CHECKING:
    import torch

    from lowres.core.recipe import Recipe


@part
class OptimizerOffload(Lever):
    """Saves the states on the device (8 bytes a trained parameter under AdamW in float32), and
    costs them on the host with two staging buffers of the largest parameter.

    An update takes what the bus and the host need: each parameter and gradient there, each
    parameter back. Without a GPU the same copies are made within one memory.

    Args:
        float32_master: Keep trained weights of 16 bits also in float32, on the host, and update
            those (4 more bytes a parameter). The run then differs from the one without the lever:
            small updates are not rounded away.
    """

    effect: ClassVar[Literal["exact", "lossy"]] = "exact"

    float32_master: bool = False

    def check(self, recipe: Recipe) -> Iterator[str]:
        reason = recipe.optimizer.refuses.get("on_host")
        if reason is not None:
            yield f"'{recipe.optimizer.name}' {reason}"
        if self.float32_master and recipe.model.dtype == "float32":
            yield (
                "float32_master keeps a wider copy of 16-bit weights, and model.dtype is float32; "
                "set float32_master to false, or model.dtype to bfloat16"
            )

    def alone(self) -> str:
        return (
            "puts parameters into other memory for their update, after which gradients would no "
            "longer be exchanged; use 'zero', which divides states"
        )

    def on_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        from lowres.levers._host_optimizer import HostOptimizer

        return HostOptimizer(optimizer, self.float32_master)
