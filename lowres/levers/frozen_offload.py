"""Hold the frozen weights of the blocks in host memory; each block's come while it is at work.

Paper: ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning, Rajbhandari et
al. 2021 (section 5.1). https://arxiv.org/abs/2104.07857

Departs from the paper: one device, frozen weights alone, no disk; 4-bit weights travel packed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from lowres.core.errors import InputError, Problem
from lowres.core.parts import Lever, part
from lowres.core.rotation import Rotating

if TYPE_CHECKING:
    from lowres.core.learner import Learner, LoadRequest
    from lowres.core.recipe import Recipe


@part
class FrozenOffload(Lever):
    """What is trained, embeddings, norms outside of blocks and heads stay on the device.

    On CUDA host memory is pinned, which takes it from all other processes, and the next block is
    copied on a stream of its own while one computes. Every block is copied twice an update's
    micro-batch, three times when blocks are recomputed: large micro-batches hide that, small ones
    wait for it. On a CPU the same copies are made within one memory.

    With `loop.precision` bf16 or fp16 and `model.dtype` float32, autocast's narrow copies of the
    weights stay until backward as they do without; hold the weights in 16 bits.

    Args:
        resident: Blocks on the device at once: one at work, the others on their way.
    """

    effect: ClassVar[Literal["exact", "lossy"]] = "exact"
    searched: ClassVar[int | None] = 3

    resident: Annotated[int, Field(ge=2, le=3)] = 2

    def check(self, recipe: Recipe) -> Iterator[str]:
        if recipe.method.trains_weights and recipe.freezing.name == "none":
            yield (
                f"method '{recipe.method.name}' without freezing leaves no frozen weights; use a "
                "method that adds parameters (lora), or freezing 'prefix'"
            )
        if recipe.method.trains_weights and isinstance(recipe.freezing, Rotating):
            yield (
                f"freezing '{recipe.freezing.name}' trains every block sooner or later, so none "
                "can wait on the host; use 'optimizer_offload', or freezing 'prefix'"
            )
        if any(lever.name == "int8_weights" for lever in recipe.levers):
            yield (
                "layers of 'int8_weights' hold their weights a second time, which would stay on "
                "the device; use 'nf4_weights'"
            )

    def alone(self) -> str:
        return "moves weights that several processes would want on one kind of device; drop it"

    def on_load(self, request: LoadRequest) -> LoadRequest:
        # Weights in few bits would else be made on the device, all of them.
        return dataclasses.replace(request, options=request.options | {"device_map": {"": "cpu"}})

    def on_learner(self, learner: Learner) -> Learner:
        from lowres.bridges import peft, streaming

        model = peft.unwrap_adapted(learner.base)
        if not streaming.stream(model, learner.blocks.names, self.resident):
            text = (
                "'frozen_offload': no weight of a block is frozen; use a method that adds "
                "parameters (lora), or freezing 'prefix'"
            )
            raise InputError("the recipe", [Problem("levers", text)])
        return learner
