"""AdamW with its states in 8 bits, which move to the host while the device's memory is short.

Paper: QLoRA: Efficient Finetuning of Quantized LLMs, Dettmers et al. 2023 (paged optimizers).
https://arxiv.org/abs/2305.14314

Departs from the paper: states of under 100,000 elements stay on the device (as bitsandbytes does).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from lowres.core.errors import InputError, Problem
from lowres.core.parts import part
from lowres.core.rotation import Rotating
from lowres.optimizers._bitsandbytes import BlockwiseAdamw

if TYPE_CHECKING:
    import torch

    from lowres.core.engine import Accelerator, Engine
    from lowres.core.learner import Learner
    from lowres.core.recipe import Recipe


@part
class PagedAdamw8bit(BlockwiseAdamw):
    """bitsandbytes' PagedAdamW8bit, through CUDA's unified memory; the driver moves the pages."""

    refuses: ClassVar[Mapping[Literal["in_backward", "on_host", "divided"], str]] = {
        "on_host": "moves its states between device and host by itself, a page at a time; use "
        "adamw with this lever, or drop the lever",
        "divided": "keeps its states on the device in its own form; use adamw with this lever",
    }
    variant: ClassVar[Literal["AdamW8bit", "PagedAdamW8bit"]] = "PagedAdamW8bit"

    def check(self, recipe: Recipe) -> Iterator[str]:
        if isinstance(recipe.freezing, Rotating):
            yield (
                f"freezing '{recipe.freezing.name}' makes states anew in each period, and memory "
                "that CUDA shares with the host is not given back; use adamw_8bit"
            )

    def engine(
        self, accelerator: Accelerator, learner: Learner, optimizer: torch.optim.Optimizer
    ) -> Engine:
        from torch._subclasses.fake_tensor import is_fake

        # A plan for a CUDA device may be made on fake tensors where there is none.
        planned = any(is_fake(p) for group in optimizer.param_groups for p in group["params"])
        if accelerator.device.type != "cuda" and not planned:
            raise InputError(
                "the recipe",
                [
                    Problem(
                        "optimizer",
                        "'paged_adamw_8bit' pages its states through the memory that CUDA shares "
                        f"with the host, and this run is on '{accelerator.device.type}'; use "
                        "adamw_8bit",
                    )
                ],
            )
        return super().engine(accelerator, learner, optimizer)
