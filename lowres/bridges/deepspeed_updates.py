"""How DeepSpeed's ZeRO stages 1 and 2 make an update, for a plan: `Partitions` filled as DeepSpeed
fills them.

Source: deepspeed 0.19, runtime/zero/stage_1_and_2.py (`setup_buckets`, `reduce_ipg_grads`,
`reduce_independent_p_g_buckets_and_remove_grads`, `average_tensor`, `copy_grads_in_partition`,
`independent_gradient_partition_epilogue`, `step`) and runtime/engine.py (`allreduce_gradients`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lowres.bridges.deepspeed_engine import PlannedEngine, copied_to_save
from lowres.bridges.deepspeed_settings import Settings
from lowres.bridges.deepspeed_shapes import Partitions

if TYPE_CHECKING:
    from lowres.core.engine import Engine


class PlannedUpdates(PlannedEngine):
    """The engine over `Partitions`: gradients go through a bucket into the part."""

    _held: Partitions

    def __init__(self, inner: Engine, settings: Settings) -> None:
        super().__init__(inner)
        self._stage, self._most = settings.stage, settings.bucket_elements(self.learner.base)
        self._buckets_held = 2 if settings.overlap else 1
        self._group_of = {id(p): g for g in self._held.groups for p in g.parameters}
        self._buckets: list[torch.Tensor] = []  # The first of them is being filled.
        self._waiting: list[torch.nn.Parameter] = []
        self._collected: torch.Tensor | None = None
        self._collected_at = 0
        self._on_host: dict[int, torch.Tensor] = {}
        self._passes = 0
        for group in self._held.groups:
            for parameter in group.parameters:
                parameter.register_post_accumulate_grad_hook(self._came)

    def accumulate(self, loss_sum: torch.Tensor, share: float, last: bool) -> None:
        self._last = last
        self.accelerator.backward(loss_sum * share)
        if self._stage == 2 or last:
            if self._stage == 1:
                for group in self._held.groups:
                    for parameter in group.parameters:
                        if parameter.grad is not None:
                            self._into_bucket(parameter)
            self._epilogue()

    def _came(self, parameter: torch.nn.Parameter) -> None:
        if not self._buckets:
            for _ in range(self._buckets_held):
                self._buckets.append(torch.empty(self._most, dtype=self._held.dtype))
            self._passes += 1
        if self._stage == 2:
            self._into_bucket(parameter)

    @torch.no_grad()
    def _into_bucket(self, parameter: torch.nn.Parameter) -> None:
        size = parameter.numel()
        filled = sum(p.numel() for p in self._waiting)
        if filled + size > self._most:
            self._reduce()
            self._buckets.reverse()
            filled = 0
        assert parameter.grad is not None
        if size > self._most:
            if self._held.offload:
                parameter.grad = parameter.grad.clone()
        else:
            there = self._buckets[0][filled : filled + size].view(parameter.shape)
            parameter.grad = there.copy_(parameter.grad)
        self._waiting.append(parameter)

    @torch.no_grad()
    def _reduce(self) -> None:
        """Average what waits over the processes, and keep what belongs to this one's part."""
        owners = [part for p in self._waiting for part in self._group_of[id(p)].parts[id(p)]]
        changes = sum(a != b for a, b in zip(owners, owners[1:], strict=False))
        if changes:  # Pieces for several processes are sent as one copy.
            torch.empty(sum(p.numel() for p in self._waiting), dtype=self._held.dtype)
        for parameter in self._waiting:
            if 0 in self._group_of[id(parameter)].parts[id(parameter)]:
                self._keep(parameter)
            elif self._stage == 2:
                parameter.grad = None
        self._waiting.clear()

    def _keep(self, parameter: torch.nn.Parameter) -> None:
        parts, gradient = self._held, parameter.grad
        assert gradient is not None
        if not parts.offload:
            if self._collected is None:
                owned = [p for g in parts.groups for p in g.parameters if 0 in g.parts[id(p)]]
                self._collected = torch.empty(sum(p.numel() for p in owned), dtype=parts.dtype)
                self._collected_at = 0
            at, self._collected_at = self._collected_at, self._collected_at + parameter.numel()
            there = self._collected[at : self._collected_at].view(parameter.shape)
            parameter.grad = there.copy_(gradient)
            return
        if self._passes > 1 or not self._last:
            if id(parameter) not in self._on_host:
                self._on_host[id(parameter)] = parts.place.empty(parameter.numel(), parameter.dtype)
            self._on_host[id(parameter)].copy_(gradient.view(-1))
        if self._last:
            own = gradient.view(-1)[: self._group_of[id(parameter)].own[id(parameter)]]
            own.to(torch.double)  # for its norm
            if own.dtype != torch.float32:
                own.float()
            parameter.grad = None

    @torch.no_grad()
    def _epilogue(self) -> None:
        self._reduce()
        for group in self._held.groups if not self._held.offload else ():
            owned = [p for p in group.parameters if 0 in group.parts[id(p)]]
            if not group.gradients:
                group.gradients = [p.grad for p in owned if p.grad is not None]
        self._buckets, self._collected = [], None
        for group in self._held.groups:
            for parameter in group.parameters:
                parameter.grad = None

    @torch.no_grad()
    def update(self, lr: float, max_grad_norm: float | None) -> float | None:
        self._passes = 0
        for group in self._held.groups:
            for gradient in group.gradients:
                gradient.to(torch.double)  # for its norm
        self.optimizer.step()
        return None

    def saving(self, model: Any) -> list[torch.Tensor]:
        """Copies that transformers and PEFT make of what shares a storage while it is saved."""
        copied = [copied_to_save(model, group.parameters) for group in self._held.groups]
        return [p.detach().clone() for some in copied for p in some]
