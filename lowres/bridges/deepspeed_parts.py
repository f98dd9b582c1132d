"""Parameters of which each process holds a part, for a plan: put together and let go as DeepSpeed's
ZeRO stage 3 does it, without DeepSpeed and its processes.

Source: deepspeed 0.19, runtime/zero/partition_parameters.py (`Init._partition_param`,
`all_gather_coalesced`, `NoGatherCoalescedHandle`, `AllGatherCoalescedHandle`,
`_allgather_params_coalesced`, `_allgather_params_sequential`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from lowres.core import host

if TYPE_CHECKING:
    from lowres.bridges.deepspeed_files import Buffers


@dataclass
class Place:
    """Where something lies.

    Args:
        apart: In host memory that is not the device's.
        pinned: Page-locked.
    """

    apart: bool = False
    pinned: bool = False

    def empty(self, elements: int, dtype: torch.dtype, lasting: bool = True) -> torch.Tensor:
        """Memory there; on the host page-locked, if any is, where it is `lasting`."""
        if not self.apart:
            return torch.empty(elements, dtype=dtype)
        kind: host.Memory = "pinned" if self.pinned and lasting else "pageable"
        with host.memory(kind):
            return host.mark(torch.empty(elements, dtype=dtype), kind)

    def there(self) -> contextlib.AbstractContextManager[None]:
        """While it lasts, what is allocated lies there."""
        return host.memory() if self.apart else contextlib.nullcontext()

    def moved(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor here and of that type: itself, where it is."""
        dtype = dtype or tensor.dtype
        if host.holds(tensor) == self.apart and tensor.dtype == dtype:
            return tensor
        return self.empty(tensor.numel(), dtype, lasting=False)


HERE = Place()
"""The device."""


@dataclass(eq=False)
class Part:
    """One parameter and what this process holds of it.

    Args:
        number: In the order of the model's parameters.
        size: Elements of the part, the same in all processes.
        stays: Small enough to be whole from one update to the next.
        users: Modules at work that read it.
        buffers: Where parameters come from a disk.
        on_disk: The part lies there, and not in host memory.
        read: It is in a buffer.
    """

    number: int
    parameter: torch.nn.Parameter
    shape: torch.Size
    elements: int
    size: int
    stays: bool
    tensor: torch.Tensor
    state: Literal["apart", "coming", "whole"] = "apart"
    users: set[int] = field(default_factory=set)
    buffers: Buffers | None = None
    on_disk: bool = False
    read: bool = False

    def let_go(self) -> bool:
        """Leave the part alone; False where it is not whole or a module reads it."""
        if self.state != "whole" or self.users:
            return False
        self.parameter.data = torch.empty(0, dtype=self.parameter.dtype)
        self.state = "apart"
        if self.buffers is not None:
            self.buffers.give_back(self)
        return True

    def fill(self, flat: torch.Tensor) -> None:
        self.parameter.data = flat[: self.elements].view(self.shape)


def read(parts: Sequence[Part]) -> None:
    """Bring those that lie on a disk into buffers, all together."""
    if parts and parts[0].buffers is not None:
        parts[0].buffers.read(parts)


class Gathering:
    """Parameters on their way; they are there after `wait`."""

    def __init__(self, parts: Sequence[Part], processes: int) -> None:
        self._parts = sorted(parts, key=lambda part: part.number)
        self._flats: list[tuple[list[Part], torch.Tensor]] = []
        self._sent: list[torch.Tensor] = []
        self._done = False
        read(self._parts)
        for part in self._parts:
            part.state = "coming"
        if processes == 1:
            for part in self._parts:
                part.fill(HERE.moved(part.tensor))
        elif len(self._parts) == 1:
            (part,) = self._parts
            flat = torch.empty(part.size * processes, dtype=part.tensor.dtype)
            self._sent = [HERE.moved(part.tensor)]
            part.fill(flat)
        else:
            kinds = itertools.groupby(
                sorted(self._parts, key=lambda p: str(p.tensor.dtype)), lambda p: p.tensor.dtype
            )
            for dtype, alike in kinds:
                some = list(alike)
                flat = torch.empty(sum(p.size for p in some) * processes, dtype=dtype)
                [HERE.moved(p.tensor) for p in some]
                self._flats.append((some, flat))

    def wait(self) -> None:
        if self._done:
            return
        self._sent = []
        for some, _ in self._flats:  # Held until the last of their parameters was asked for.
            for part in some:
                part.fill(torch.empty(part.elements, dtype=part.tensor.dtype))
        for part in self._parts:
            part.state = "whole"
        self._done = True


def gather_now(parts: Sequence[Part], processes: int) -> None:
    """Put parameters together, each in memory of its own unless it is whole already."""
    wanted = [part for part in parts if part.state == "apart"]
    if len(wanted) > 1 and processes == 1:
        Gathering(wanted, processes).wait()
        return
    read(wanted)
    sent = []
    flats = []
    for part in wanted:
        sent.append(HERE.moved(part.tensor))
    for part in wanted:
        flats.append(torch.empty(part.size * processes, dtype=part.tensor.dtype))
    for part, flat in zip(wanted, flats, strict=True):
        part.fill(flat)
        part.state = "whole"


def divide(
    model: torch.nn.Module,
    processes: int,
    place: Place,
    most_staying: int,
    buffers: Buffers | None = None,
) -> dict[int, Part]:
    """Leave of each parameter a part, by its id.

    Args:
        place: Of the parts of parameters that do not stay.
        most_staying: Elements of the largest parameter that stays.
        buffers: Where large parts go to a disk.
    """
    parts: dict[int, Part] = {}
    for number, parameter in enumerate(model.parameters()):
        elements = parameter.numel()
        size = -(-elements // processes)
        stays = elements <= most_staying
        where = HERE if stays else place
        written = None if buffers is None else buffers.written(size, parameter.dtype)
        tensor = where.empty(size, parameter.dtype) if written is None else written
        part = Part(number, parameter, parameter.shape, elements, size, stays, tensor, "whole",
                    buffers=buffers, on_disk=written is not None)  # fmt: skip
        part.let_go()
        parts[id(parameter)] = part
    return parts
