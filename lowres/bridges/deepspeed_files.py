"""Files of DeepSpeed's ZeRO stage 3 and the page-locked memory between them and it, for a plan.

Source: deepspeed 0.19, runtime/swap_tensor/partitioned_param_swapper.py
(`AsyncPartitionedParameterSwapper`), optimizer_utils.py (`OptimizerSwapper`); csrc/pin_memory: what
is locked there is given as asked for, not in powers of two as torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lowres.bridges.deepspeed_buffers import Disk, few_buffers, refusal
from lowres.bridges.deepspeed_parts import Part, Place
from lowres.core import host


def filed(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """A file, which takes no memory."""
    with host.memory("mapped"):
        return host.mark(torch.empty(elements, dtype=dtype), "mapped")


class Buffers:
    """Through which parameters come from the disk: one for each of them that is whole or about to.

    Args:
        apart: Host memory is not the device's.
    """

    def __init__(self, disk: Disk, dtype: torch.dtype, apart: bool) -> None:
        self.disk = disk
        self.free = disk.weight_buffers
        elements = disk.weight_buffers * disk.aligned(disk.weight_elements, dtype)
        self.memory = Place(apart).empty(elements, dtype)
        self._files: list[torch.Tensor] = []

    def tensors(self) -> list[torch.Tensor]:
        """In memory and in files."""
        return [self.memory, *self._files]

    def written(self, elements: int, dtype: torch.dtype) -> torch.Tensor | None:
        """A part in a buffer and in its file; None where it is too small for one."""
        if not self.disk.takes(elements, dtype):
            return None
        self._files.append(filed(self.disk.aligned(elements, dtype), dtype))
        return self.memory[:elements]

    def read(self, parts: Sequence[Part]) -> None:
        """Read those into buffers that lie on the disk, all together.

        Raises:
            InputError: Where DeepSpeed would stop: for too few buffers, or one that is read twice.
        """
        away = [part for part in parts if part.on_disk and not part.read]
        if len(set(away)) < len(away):
            raise refusal(
                "a parameter on nvme is needed twice within what DeepSpeed reads ahead, and it "
                "stops there; say stage3_prefetch_bucket_size 0"
            )
        if len(away) > self.free:
            count = self.disk.weight_buffers
            raise refusal(few_buffers(count, count - self.free + len(away)))
        for part in away:
            part.read = True
        self.free -= len(away)

    def give_back(self, part: Part) -> None:
        """What was read is needed no longer."""
        if part.read:
            part.read = False
            self.free += 1


class States:
    """Optimizer states and float32 copies of large sub-groups, of which one at a time is in memory.

    Args:
        largest: Elements of the largest sub-group.
        apart: Host memory is not the device's.
    """

    def __init__(self, disk: Disk, largest: int, apart: bool) -> None:
        self.disk = disk
        elements = disk.aligned(largest, torch.float32)
        self.buffers = [
            Place(apart).empty(elements, torch.float32) for _ in range(disk.state_buffers)
        ]
        self._files: dict[tuple[int, int], torch.Tensor] = {}

    def tensors(self) -> list[torch.Tensor]:
        """In memory and in files."""
        return [*self.buffers, *self._files.values()]

    def takes(self, elements: int) -> bool:
        """Whether a sub-group is large enough to lie on the disk."""
        return self.disk.takes(elements, torch.float32)

    def file(self, group: int, number: int, elements: int) -> None:
        """Write one tensor of a sub-group, by the place of both."""
        if (group, number) not in self._files:
            aligned = self.disk.aligned(elements, torch.float32)
            self._files[group, number] = filed(aligned, torch.float32)

    def written(self, group: int, states: dict[str, Any]) -> dict[str, Any]:
        """States of a sub-group as they are read again: in the buffers, new ones too."""
        place = 0
        for name, value in states.items():
            if isinstance(value, torch.Tensor) and self.takes(value.numel()):
                place += 1
                self.file(group, place, value.numel())
                states[name] = self.buffers[place][: value.numel()]
        return states

    def small(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """Of a parameter's gradient, what waits in memory for the update: all of a small one, else
        what is over the last multiple that is written. That keeps the whole of it alive."""
        if not self.takes(gradient.numel()):
            return gradient
        over = gradient.numel() % (self.disk.aligned_bytes // gradient.element_size())
        return gradient[gradient.numel() - over :] if over else None
