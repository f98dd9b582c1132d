"""What DeepSpeed's ZeRO stage 3 holds, for a plan: the same tensors in the same order, without
DeepSpeed and its processes. `deepspeed_fetches` says when parameters are whole.

Source: deepspeed 0.19, runtime/zero/stage3.py (`_create_fp16_partitions_with_defragmentation`,
`_create_fp32_partitions`, `initialize_optimizer_states`, `_setup_for_real_optimizer`,
`create_reduce_and_remove_grad_hooks`, `step`). Scalars are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from lowres.bridges.deepspeed_files import Buffers, States
from lowres.bridges.deepspeed_linear import in_place_of_linear
from lowres.bridges.deepspeed_parts import HERE, Part, Place, divide, gather_now
from lowres.bridges.deepspeed_settings import Settings
from lowres.bridges.deepspeed_shapes import Planned, flattened
from lowres.core import host


@dataclass(eq=False)
class SubGroup:
    """Parameters that are updated together.

    Args:
        flat: Their parts in a row, in the type that is computed with; None where they are on a
            disk, or too many for host memory.
        master: The same in float32, which is updated.
        gradients: Of the parts, after backward.
        on_disk: Master and states lie there between updates.
        small: Gradients that are too small for a file, by parameter.
        states: While they are on the disk.
    """

    options: dict[str, Any]
    parts: list[Part]
    size: int
    flat: torch.Tensor | None
    master: torch.Tensor = field(init=False)
    gradients: list[torch.Tensor] = field(default_factory=list)
    on_disk: bool = False
    small: dict[int, torch.Tensor] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)


class Divided(torch.optim.Optimizer):
    """Takes the place of the optimizer it is given, which updates this process's parts in float32.

    Args:
        model: Its parameters are divided, frozen ones too.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        wanted: Planned,
        settings: Settings,
        model: torch.nn.Module,
    ) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self._inner, self.processes, self.apart = inner, wanted.processes, wanted.apart
        self.offload = settings.offload
        self.states = Place(wanted.apart and settings.offload, settings.pinned)
        weights = Place(wanted.apart and settings.offload_parameters, settings.pinned_parameters)
        self._flat_weights = Place(weights.apart, True) if settings.offload_parameters else HERE
        self.state, self.param_groups = inner.state, inner.param_groups
        self.dtype = inner.param_groups[0]["params"][0].dtype
        self._disk = settings.disk
        self._buffers = (
            Buffers(settings.disk, self.dtype, wanted.apart) if settings.disk.weights else None
        )
        self.parts = divide(
            model, self.processes, weights, settings.staying_elements(model), self._buffers
        )
        chosen = [
            (group, some)
            for group in inner.param_groups
            for some in self._sub_groups(group, int(settings.divided["sub_group_size"]))
        ]
        self.groups = self._flat(chosen, settings.offload_parameters)
        self._written = self._to_write()
        self.on_disk: States | None = None
        if self._disk.states:
            largest = max(group.size for group in self.groups)
            self.on_disk = States(self._disk, largest, wanted.apart)
        self._masters()
        self._zero_gradients()
        self.bucket = torch.empty(settings.bucket_elements(model), dtype=self.dtype)
        trained = [part for group in self.groups for part in group.parts]
        total = sum(part.size for part in trained)
        self.gradients = self._pinned_copy(total, self.dtype)
        self.gradient_of: dict[int, torch.Tensor] = {}
        at = 0
        for part in trained:
            self.gradient_of[id(part.parameter)] = self.gradients[at : at + part.size]
            at += part.size
        self.group_of = {id(p.parameter): group for group in self.groups for p in group.parts}
        self._put_hooks(trained)
        wanted.until.enter_context(in_place_of_linear(self.whole))
        for group in inner.param_groups:
            group["params"] = [g.master for g in self.groups if g.options is group]

    def _put_hooks(self, trained: list[Part]) -> None:
        """Each parameter is whole for that, one after the other. Where gloo sends, its thread may
        let go of one late, when the next is there already.
        """
        late: list[torch.Tensor] = []
        for part in trained:
            gather_now([part], self.processes)
            late = [] if self.apart else [part.parameter.data]
            part.let_go()
        late.clear()

    @contextlib.contextmanager
    def whole(self, parameter: torch.Tensor) -> Iterator[None]:
        """One parameter is whole while it lasts."""
        part = self.parts.get(id(parameter))
        if part is None or part.state != "apart":
            yield
            return
        gather_now([part], self.processes)
        yield
        part.let_go()

    def _sub_groups(self, group: dict[str, Any], most: int) -> Iterator[list[Part]]:
        some: list[Part] = []
        for parameter in group["params"]:
            some.append(self.parts[id(parameter)])
            if sum(part.size for part in some) >= most:
                yield some
                some = []
        if some:
            yield some

    def _flat(
        self, chosen: list[tuple[dict[str, Any], list[Part]]], offload: bool
    ) -> list[SubGroup]:
        """The trained parts one after the other in one tensor; each group's own, on the host."""
        made: list[SubGroup] = []
        sizes = [sum(part.size for part in some) for _, some in chosen]
        if offload:
            whole: dict[int, torch.Tensor] = {}
            kept = 0
            for options, _ in chosen:
                if id(options) not in whole:
                    total = sum(s for s, (o, _) in zip(sizes, chosen, strict=True) if o is options)
                    room = total
                    if self._disk.weights:
                        room = min(total, max(0, self._disk.in_memory_elements - kept))
                    kept += total
                    whole[id(options)] = self._flat_weights.empty(max(room, 1), self.dtype)
            flats = [whole[id(options)] for options, _ in chosen]
        else:
            collected = Place(self.apart).empty(sum(sizes), self.dtype)
            for _, some in chosen:
                for part in some:
                    part.tensor = collected
            flats = [HERE.moved(collected)] * len(chosen)
            del collected
        taken: dict[int, int] = {}
        for (options, some), size, flat in zip(chosen, sizes, flats, strict=True):
            at = taken.get(id(flat), 0)
            taken[id(flat)] = at + size
            if at + size > flat.numel():
                made.append(SubGroup(options, some, size, None))
                continue
            own = flat[at : at + size]
            at = 0
            for part in some:
                part.tensor, part.on_disk = own[at : at + part.size], False
                at += part.size
            made.append(SubGroup(options, some, size, own))
        return made

    def _to_write(self) -> list[torch.Tensor]:
        """Where updated parameters wait to be written, those of the largest sub-group."""
        if self._buffers is None or all(group.flat is not None for group in self.groups):
            return []
        largest = max(self.groups, key=lambda group: group.size)
        elements = sum(self._disk.aligned(part.size, self.dtype) for part in largest.parts)
        return [Place(self.apart).empty(elements, self.dtype)]

    def _masters(self) -> None:
        """Copies in float32, made by way of another copy where place or type differ."""
        for number, group in enumerate(self.groups):
            if group.flat is None:
                read = self.states.empty(group.size, torch.float32, lasting=False)
            if self.on_disk is not None and self.on_disk.takes(group.size):
                group.on_disk = True
                group.master = self.on_disk.buffers[0][: group.size]
                self.on_disk.file(number, 0, group.size)
            elif group.flat is None:
                group.master = read
            else:
                converted = self.states.moved(group.flat, torch.float32)
                group.master = self.states.empty(converted.numel(), torch.float32)
            group.master.requires_grad_(True)

    def _zero_gradients(self) -> None:
        largest = max(group.size for group in self.groups)
        zeros = self.states.empty(largest, torch.float32, lasting=False)
        if self.offload:
            for group in self.groups:
                if not group.on_disk:
                    group.master.grad = self._pinned_copy(group.size, torch.float32)
        del zeros

    def keep_small(self, group: SubGroup, part: Part, gradient: torch.Tensor) -> None:
        """Write a gradient of a sub-group on the disk, but for what is too small."""
        assert self.on_disk is not None
        small = self.on_disk.small(gradient)
        if small is not None:
            group.small[part.number] = small
        if small is not gradient:
            number = self.groups.index(group)
            kept = 0 if small is None else small.numel()
            self.on_disk.file(number, -1 - part.number, gradient.numel() - kept)

    def _pinned_copy(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Page-locked memory is a copy of what was made before."""
        pinned = self.states.pinned and self.states.apart
        first = self.states.empty(elements, dtype, lasting=not pinned)
        return self.states.empty(elements, dtype) if pinned else first

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        every = self._inner.param_groups
        for group in self.groups:
            for gradient in group.gradients:
                gradient.to(torch.double)  # for its norm
        for number, group in enumerate(self.groups):
            if self.on_disk is not None and group.on_disk:
                group.master.grad = self.on_disk.buffers[-1][: group.size]
                self.state[group.master] = group.states
            if not self.offload:
                gathered = flattened(group.gradients)
                group.master.grad = gathered.to(torch.float32)
                del gathered
                group.gradients = []
            with self.states.there():
                self._inner.param_groups = [group.options | {"params": [group.master]}]
                self._inner.step()
                if self.states.apart:
                    _on_host(self.state[group.master])
                if self.states.apart and group.flat is not None and self.dtype != torch.float32:
                    group.master.to(self.dtype)  # on its way to the weights
            if not self.offload:
                group.master.grad = None
            if self.on_disk is not None and group.on_disk:
                group.states = self.on_disk.written(number, self.state.pop(group.master))
                group.master.grad = None
                group.small = {}
        self._inner.param_groups = every
        gather_now([part for part in self.parts.values() if part.stays], self.processes)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with self.states.there():
            self._inner.load_state_dict(state_dict)
        self.state, self.param_groups = self._inner.state, self._inner.param_groups

    def buffers(self) -> Iterator[tuple[torch.Tensor, str]]:
        """What is held beside states and whole parameters, with its category."""
        for part in self.parts.values():
            yield part.tensor, "weights"
        if self._buffers is not None:
            for tensor in (*self._written, *self._buffers.tensors()):
                yield tensor, "weights"
        if self.on_disk is not None:
            yield from ((tensor, "optimizer states") for tensor in self.on_disk.tensors())
        for group in self.groups:
            yield group.master, "optimizer states"
            if group.master.grad is not None:
                yield group.master.grad, "gradients"
        yield self.gradients, "gradients"
        yield self.bucket, "workspaces"


def _on_host(states: dict[str, Any]) -> None:
    for value in states.values():
        if isinstance(value, torch.Tensor):
            host.mark(value)
