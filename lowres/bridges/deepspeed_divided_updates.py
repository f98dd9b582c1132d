"""How DeepSpeed's ZeRO stage 3 makes an update, for a plan: `Divided` filled as DeepSpeed fills it.

Source: deepspeed 0.19, runtime/zero/stage3.py (`reduce_independent_p_g_buckets_and_remove_grads`,
`__add_grad_to_ipg_bucket`, `__avg_scatter_grads`, `partition_grads`,
`independent_gradient_partition_epilogue`) and runtime/comm/coalesced_collectives.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from lowres.bridges.deepspeed_divided import Divided, SubGroup
from lowres.bridges.deepspeed_engine import PlannedEngine, copied_to_save
from lowres.bridges.deepspeed_fetches import Fetches
from lowres.bridges.deepspeed_hooks import Hooks
from lowres.bridges.deepspeed_parts import HERE, Part, gather_now
from lowres.bridges.deepspeed_settings import Settings

if TYPE_CHECKING:
    from lowres.core.engine import Engine


class DividedUpdates(PlannedEngine):
    """The engine over `Divided`: gradients go through a bucket into parts."""

    _held: Divided

    def __init__(self, inner: Engine, settings: Settings) -> None:
        super().__init__(inner)
        held, model = self._held, self.learner.base
        self._fetches = Fetches(model, held.parts, settings, held.processes)
        self._hooks = Hooks(model, self._fetches, held.parts, held.processes)
        self._waiting: list[Part] = []
        for group in held.groups:
            for part in group.parts:
                part.parameter.register_post_accumulate_grad_hook(self._came)

    def accumulate(self, loss_sum: torch.Tensor, share: float, last: bool) -> None:
        self._last = last
        self.accelerator.backward(loss_sum * share)
        self._reduce()
        with torch.no_grad():
            self._fetches.end_backward()
        for group in self._held.groups:
            group.gradients = [self._held.gradient_of[id(p.parameter)] for p in group.parts]

    @torch.no_grad()
    def _came(self, parameter: torch.Tensor) -> None:
        held, part = self._held, self._held.parts[id(parameter)]
        filled = sum(one.elements for one in self._waiting)
        if filled and filled + part.elements > held.bucket.numel():
            self._reduce()
            filled = 0
        assert parameter.grad is not None
        if filled + part.elements <= held.bucket.numel():
            there = held.bucket[filled : filled + part.elements].view(parameter.grad.shape)
            parameter.grad = there.copy_(parameter.grad)
        self._waiting.append(part)

    @torch.no_grad()
    def _reduce(self) -> None:
        """Average what waits over the processes, and keep this one's part."""
        held, waiting = self._held, self._waiting
        if not waiting:
            return
        sent = sum(part.size for part in waiting) * held.processes
        collected = None
        if len(waiting) > 1 or sent != waiting[0].elements:
            collected = torch.empty(sent, dtype=held.dtype)
        if not held.apart:
            torch.empty(sent, dtype=held.dtype)  # gloo sends a copy
        to_disk: list[tuple[SubGroup, Part, torch.Tensor]] = []
        for part in waiting:
            group = held.group_of[id(part.parameter)]
            own = held.gradient_of[id(part.parameter)]
            if held.offload and self._last:
                here = HERE.moved(own)
                here.to(torch.double)  # for its norm
                wide = here.to(torch.float32)
                if group.on_disk:
                    to_disk.append((group, part, wide))
                del wide
            elif held.offload:
                HERE.moved(own)
            part.parameter.grad = None
        for group, part, wide in to_disk:
            held.keep_small(group, part, wide)
        del collected
        waiting.clear()

    @torch.no_grad()
    def update(self, lr: float, max_grad_norm: float | None) -> float | None:
        self._fetches.release_all()
        self.optimizer.step()
        return None

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[list[Part]]:
        trained = [part for group in self._held.groups for part in group.parts]
        gather_now(trained, self._held.processes)
        yield trained
        for part in trained:
            part.let_go()

    def saving(self, model: Any) -> list[torch.Tensor]:
        """All trained parameters together; in one process they share a storage, and are copied as
        in `PlannedUpdates.saving`. Those on a disk share that of the buffers, small ones none."""
        flat = [
            part for group in self._held.groups if group.flat is not None for part in group.parts
        ]
        with self._gathered() as trained:
            on_disk = [part for part in trained if part.on_disk and not self._held.apart]
            copied = []
            for some in (flat, on_disk) if self._held.processes == 1 else ():
                if len(some) > 1:
                    copied += copied_to_save(model, [part.parameter for part in some])
            return [parameter.detach().clone() for parameter in copied]
