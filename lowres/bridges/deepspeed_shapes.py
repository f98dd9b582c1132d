"""What DeepSpeed's ZeRO stages 1 and 2 hold, for a plan: the same tensors in the same order,
without DeepSpeed and its processes. `deepspeed_updates` says what an update makes of it.

Source: deepspeed 0.19, runtime/zero/stage_1_and_2.py (`DeepSpeedZeroOptimizer.__init__`), and
runtime/engine.py (`_configure_distributed_model`). Scalars are left out.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lowres.bridges.deepspeed_parts import Place
from lowres.core import host


@dataclass
class Planned:
    """What a plan is made for.

    Args:
        processes: That share the updates; the first of them is planned.
        apart: Host memory is not the device's memory.
        half: The type that DeepSpeed casts the model to; None where it leaves it.
        model: Known once it is there.
        until: What lasts as long as the plan is made.
    """

    processes: int
    apart: bool
    half: torch.dtype | None
    model: torch.nn.Module | None = None
    until: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


_planned: contextvars.ContextVar[Planned | None] = contextvars.ContextVar("planned", default=None)


@contextlib.contextmanager
def planning(processes: int, apart: bool, precision: str) -> Iterator[None]:
    """A plan is made while the block runs."""
    half = torch.bfloat16 if precision == "bf16" else None
    wanted = Planned(processes, apart, half)
    token = _planned.set(wanted)
    try:
        with wanted.until:
            yield
    finally:
        _planned.reset(token)


def planned() -> Planned | None:
    """What a plan is being made for; None in a run."""
    return _planned.get()


@dataclass
class Group:
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
        pinned: Host memory is page-locked.
    """

    def __init__(
        self, inner: torch.optim.Optimizer, wanted: Planned, offload: bool, pinned: bool
    ) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self._inner, self.offload, self.processes = inner, offload, wanted.processes
        self.place = Place(wanted.apart and offload, pinned)
        self.state, self.param_groups = inner.state, inner.param_groups
        self.groups = [self._divided(group) for group in inner.param_groups]
        largest = max(p.numel() for group in self.groups for p in group.parameters)
        self.dtype = self.groups[0].flat.dtype
        self.staging = [torch.empty(largest, dtype=self.dtype)] if offload else []
        if offload:
            self.staging.append(self.place.empty(largest, self.dtype))
            for group in self.groups:
                group.master.grad = self.place.empty(group.size, torch.float32)
        else:
            for group in self.groups:
                group.master.grad = torch.empty(group.size, dtype=torch.float32)
            for group in self.groups:
                group.master.grad = None

    def _divided(self, group: dict[str, Any]) -> Group:
        parameters = list(group["params"])
        together: list[torch.Tensor] = [p.detach() for p in parameters]
        elements = sum(p.numel() for p in parameters)
        aligned = 2 * self.processes
        if elements % aligned:
            pad = torch.empty(aligned - elements % aligned, dtype=together[0].dtype)
            together.append(pad)
        flat = flattened(together)
        del together
        made = Group(parameters, flat, flat, flat.numel() // self.processes)
        at = 0
        for parameter in parameters:
            parameter.data = flat[at : at + parameter.numel()].view(parameter.shape)
            first, last = at // made.size, (at + parameter.numel() - 1) // made.size
            made.parts[id(parameter)] = list(range(first, last + 1))
            made.own[id(parameter)] = max(0, min(at + parameter.numel(), made.size) - at)
            at += parameter.numel()
        made.master = flat[: made.size].clone()
        if self.place.apart or made.master.dtype != torch.float32:
            made.master = self.place.empty(made.size, torch.float32)
        if self.offload:
            made.buffer = self.place.empty(made.size, flat.dtype)
        made.master.requires_grad_(True)
        group["params"] = [made.master]
        return made

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        every = self._inner.param_groups
        for group, options in zip(self.groups, every, strict=True):
            if not self.offload:
                group.master.grad = self._gathered(group)
            with self.place.there():
                self._inner.param_groups = [options]
                self._inner.step()
                for value in self.state[group.master].values():
                    if self.place.apart and isinstance(value, torch.Tensor):
                        host.mark(value)
            if not self.offload:
                group.master.grad = None
        self._inner.param_groups = every

    def _gathered(self, group: Group) -> torch.Tensor:
        """The part's gradient in one tensor of float32; the pieces are dropped."""
        room, pieces = group.size, []
        for gradient in group.gradients:
            pieces.append(gradient.view(-1)[:room])
            room -= pieces[-1].numel()
        if room or not pieces:
            pieces.append(torch.empty(room, dtype=self.dtype))
        flat = flattened(pieces)
        gathered = flat.float()
        group.gradients = []
        return gathered

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with self.place.there():
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


def flattened(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor is taken as it is, several are copied together."""
    if len(tensors) == 1:
        return tensors[0].contiguous().view(-1)
    return torch.cat([t.contiguous().view(-1) for t in tensors])


def cast(model: torch.nn.Module) -> None:
    """Parameters in the type of the precision, as DeepSpeed has them instead of autocast."""
    wanted = planned()
    if wanted is None:
        return
    wanted.model = model
    if wanted.half is None:
        return
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(wanted.half)
