"""What DeepSpeed's ZeRO stages 1 and 2 hold and when, for a plan: the same tensors in the same
order, without DeepSpeed and its processes.

Source: deepspeed 0.19, runtime/zero/stage_1_and_2.py (`DeepSpeedZeroOptimizer`: `__init__`,
`reduce_independent_p_g_buckets_and_remove_grads`, `average_tensor`, `copy_grads_in_partition`,
`step`) and runtime/engine.py (`allreduce_gradients`). Scalars are left out.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lowres.core import host

if TYPE_CHECKING:
    from lowres.core.engine import Engine
    from lowres.core.learner import Learner


@dataclass(frozen=True)
class Planned:
    """What a plan is made for.

    Args:
        processes: That share the updates; the first of them is planned.
        apart: Host memory is not the device's memory.
    """

    processes: int
    apart: bool


_planned: contextvars.ContextVar[Planned | None] = contextvars.ContextVar("planned", default=None)


@contextlib.contextmanager
def planning(processes: int, apart: bool) -> Iterator[None]:
    """A plan is made while the block runs."""
    token = _planned.set(Planned(processes, apart))
    try:
        yield
    finally:
        _planned.reset(token)


def planned() -> Planned | None:
    """What a plan is being made for; None in a run."""
    return _planned.get()


@dataclass
class _Group:
    """One parameter group: all its parameters in one tensor, of which a process updates a part.

    Args:
        parts: Of each parameter, the processes that own it in part, in order.
        own: Where the parameters of this process begin and end in its part, by their id.
    """

    parameters: list[torch.nn.Parameter]
    flat: torch.Tensor
    master: torch.Tensor
    size: int
    parts: dict[int, list[int]] = field(default_factory=dict)
    own: dict[int, int] = field(default_factory=dict)
    buffer: torch.Tensor | None = None
    gradients: list[torch.Tensor] = field(default_factory=list)


class Partitions(torch.optim.Optimizer):
    """Takes the place of the optimizer it is given, which updates this process's part in float32.

    Args:
        offload: States, masters and gradients of the part are in host memory.
        pinned: Host memory is page-locked, which torch rounds up to powers of two.
    """

    def __init__(
        self, inner: torch.optim.Optimizer, wanted: Planned, offload: bool, pinned: bool
    ) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self._inner, self.offload, self.processes = inner, offload, wanted.processes
        self._apart, self._pinned = wanted.apart and offload, pinned and wanted.apart
        self.state, self.param_groups = inner.state, inner.param_groups
        self.groups = [self._divided(group) for group in inner.param_groups]
        largest = max(p.numel() for group in self.groups for p in group.parameters)
        self.dtype = self.groups[0].flat.dtype
        self.staging = [torch.empty(largest, dtype=self.dtype)] if offload else []
        if offload:
            self.staging.append(self.hosted(largest, self.dtype))
            for group in self.groups:
                group.master.grad = self.hosted(group.size, torch.float32)
        else:
            for group in self.groups:
                torch.empty(group.size, dtype=torch.float32)  # made and dropped

    def _divided(self, group: dict[str, Any]) -> _Group:
        parameters = list(group["params"])
        together: list[torch.Tensor] = [p.detach() for p in parameters]
        elements = sum(p.numel() for p in parameters)
        aligned = 2 * self.processes
        if elements % aligned:
            pad = torch.empty(aligned - elements % aligned, dtype=together[0].dtype)
            together.append(pad)
        flat = _flattened(together)
        del together
        made = _Group(parameters, flat, flat, flat.numel() // self.processes)
        at = 0
        for parameter in parameters:
            parameter.data = flat[at : at + parameter.numel()].view(parameter.shape)
            first, last = at // made.size, (at + parameter.numel() - 1) // made.size
            made.parts[id(parameter)] = list(range(first, last + 1))
            made.own[id(parameter)] = max(0, min(at + parameter.numel(), made.size) - at)
            at += parameter.numel()
        part = flat[: made.size].clone()
        if self._apart or part.dtype != torch.float32:
            part_there = self.hosted(made.size, torch.float32)
            part = part_there
        made.master = part
        if self.offload:
            made.buffer = self.hosted(made.size, flat.dtype)
        made.master.requires_grad_(True)
        group["params"] = [made.master]
        return made

    def hosted(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory where the part is: on the host when it is offloaded."""
        if not self._apart:
            return torch.empty(elements, dtype=dtype)
        size = elements * dtype.itemsize
        rounded = (1 << (size - 1).bit_length()) // dtype.itemsize if self._pinned else elements
        with host.memory():
            return host.mark(torch.empty(rounded, dtype=dtype))[:elements]

    def there(self) -> contextlib.AbstractContextManager[None]:
        """While it lasts, what is allocated lies where the part is."""
        return host.memory() if self._apart else contextlib.nullcontext()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with self.there():
            self._inner.step()
            for state in self.state.values():
                for value in state.values():
                    if self._apart and isinstance(value, torch.Tensor):
                        host.mark(value)
        for group in self.groups:
            (group.flat if group.buffer is None else group.buffer)[: group.size].copy_(group.master)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with self.there():
            self._inner.load_state_dict(state_dict)
        self.state, self.param_groups = self._inner.state, self._inner.param_groups

    def buffers(self) -> Iterator[tuple[torch.Tensor, str]]:
        """What is held beside weights and states, with its category."""
        for group in self.groups:
            yield group.master, "optimizer states"
            if group.buffer is not None:
                yield group.buffer, "workspaces"
            if group.master.grad is not None:
                yield group.master.grad, "gradients"
        for tensor in self.staging:
            yield tensor, "workspaces"


class PlannedUpdates:
    """The engine over `Partitions`: gradients go through a bucket into the part."""

    keeps_gradients = False
    own_buckets = True

    def __init__(self, inner: Engine, stage: int, bucket_elements: int) -> None:
        self.accelerator, self.learner = inner.accelerator, inner.learner
        self.optimizer = inner.optimizer
        self._parts: Partitions = getattr(inner.optimizer, "optimizer", inner.optimizer)
        self._stage, self._most = stage, bucket_elements
        self._group_of = {id(p): g for g in self._parts.groups for p in g.parameters}
        self._bucket: torch.Tensor | None = None
        self._waiting: list[torch.nn.Parameter] = []
        self._collected: torch.Tensor | None = None
        self._collected_at = 0
        self._on_host: dict[int, torch.Tensor] = {}
        self._passes = 0
        self._last = True
        for group in self._parts.groups:
            for parameter in group.parameters:
                parameter.register_post_accumulate_grad_hook(self._came)

    def buffers(self) -> Iterator[tuple[torch.Tensor, str]]:
        return self._parts.buffers()

    def begin(self, lr: float) -> None:
        pass

    def passes(self) -> Iterator[contextlib.AbstractContextManager[Any]]:
        yield contextlib.nullcontext()

    def accumulate(self, loss_sum: torch.Tensor, share: float, last: bool) -> None:
        self._last = last
        self.accelerator.backward(loss_sum * share)
        if self._stage == 2 or last:
            if self._stage == 1:
                for group in self._parts.groups:
                    for parameter in group.parameters:
                        if parameter.grad is not None:
                            self._into_bucket(parameter)
            self._epilogue()

    def _came(self, parameter: torch.nn.Parameter) -> None:
        if self._bucket is None:
            self._bucket = torch.empty(self._most, dtype=self._parts.dtype)
            self._passes += 1
        if self._stage == 2:
            self._into_bucket(parameter)

    @torch.no_grad()
    def _into_bucket(self, parameter: torch.nn.Parameter) -> None:
        size = parameter.numel()
        filled = sum(p.numel() for p in self._waiting)
        if filled + size > self._most:
            self._reduce()
            filled = 0
        assert self._bucket is not None and parameter.grad is not None
        if size > self._most:
            if self._parts.offload:
                parameter.grad = parameter.grad.clone()
        else:
            there = self._bucket[filled : filled + size].view(parameter.shape)
            parameter.grad = there.copy_(parameter.grad)
        self._waiting.append(parameter)

    @torch.no_grad()
    def _reduce(self) -> None:
        """Average what waits over the processes, and keep what belongs to this one's part."""
        owners = [part for p in self._waiting for part in self._group_of[id(p)].parts[id(p)]]
        changes = sum(a != b for a, b in zip(owners, owners[1:], strict=False))
        if changes:  # Pieces for several processes are sent as one copy.
            torch.empty(sum(p.numel() for p in self._waiting), dtype=self._parts.dtype)
        for parameter in self._waiting:
            if 0 in self._group_of[id(parameter)].parts[id(parameter)]:
                self._keep(parameter)
            elif self._stage == 2:
                parameter.grad = None
        self._waiting.clear()

    def _keep(self, parameter: torch.nn.Parameter) -> None:
        parts, gradient = self._parts, parameter.grad
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
                self._on_host[id(parameter)] = parts.hosted(parameter.numel(), parameter.dtype)
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
        for group in self._parts.groups if not self._parts.offload else ():
            owned = [p for p in group.parameters if 0 in group.parts[id(p)]]
            if not group.gradients:
                group.gradients = [p.grad for p in owned if p.grad is not None]
        self._bucket = self._collected = None
        for group in self._parts.groups:
            for parameter in group.parameters:
                parameter.grad = None

    @torch.no_grad()
    def update(self, lr: float, max_grad_norm: float | None) -> float | None:
        parts = self._parts
        self._passes = 0
        if not parts.offload:
            for group in parts.groups:
                for gradient in group.gradients:
                    gradient.to(torch.double)  # for its norm
                self._put_gradient(group)
        self.optimizer.step()
        if not parts.offload:
            for group in parts.groups:
                group.master.grad = None
        return None

    def _put_gradient(self, group: _Group) -> None:
        pieces = group.gradients
        missing = group.size - sum(g.numel() for g in pieces)
        if missing > 0:
            pieces = [*pieces, torch.empty(missing, dtype=pieces[0].dtype)]
        flat = _flattened(pieces)[: group.size]
        group.master.grad = flat.float()
        group.gradients = []

    def discard(self) -> None:
        raise NotImplementedError("a plan discards nothing")


def _flattened(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor is taken as it is, several are copied together."""
    if len(tensors) == 1:
        return tensors[0].contiguous().view(-1)
    return torch.cat([t.contiguous().view(-1) for t in tensors])
