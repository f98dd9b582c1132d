"""The events of a rehearsed step: births and deaths of storages, and the work of operations."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lowres.core.host import Memory

if TYPE_CHECKING:
    import torch

OUTSIDE = -1
"""Place of what belongs to no block: embeddings, head, loss, lists over all parameters."""

LIBRARY = "cuBLAS workspace"
"""How the operation of memory begins that a library takes once and keeps."""


@dataclass(slots=True)
class Birth:
    """Where a storage came from.

    Args:
        bytes: Of the storage.
        place: Number of the block whose work it is, or OUTSIDE.
        stage: `forward`, `recomputation`, `backward`, `optimizer step` and so on.
        module: Path of the innermost module at work; empty outside of modules.
        operation: The ATen operation.
        width: Last dimension of the tensor, by which logits are told from other tensors.
        category: Set where it is known from the start (weights), else found afterwards.
        host: The kind of host memory in which a lever keeps it; None is the device.
    """

    bytes: int
    place: int
    stage: str
    module: str
    operation: str
    width: int
    category: str = ""
    host: Memory | None = None


@dataclass(slots=True, frozen=True)
class Cost:
    """Work of one operation: for the step time.

    Args:
        flops: Of arithmetic worth counting, such as matrix products.
        bytes: Read and written.
        fixed_bytes: Of these, what is held between steps (weights) and does not grow with tokens.
    """

    place: int
    stage: str
    kind: str
    dtype: torch.dtype
    flops: int
    bytes: int
    fixed_bytes: int = 0

    def anywhere(self) -> Cost:
        """The same work without where and when."""
        return replace(self, place=OUTSIDE, stage="")

    def in_float16(self) -> Cost:
        """The work that was traced in bfloat16 in float16's place, which the CPU lacks."""
        import torch

        return replace(self, dtype=torch.float16) if self.dtype is torch.bfloat16 else self


@dataclass
class Trace:
    """An event stream: `tensors[i]` is born where `sizes[i]` > 0 and dies where it is negative.

    Args:
        places: For each event, the block at work.
        births: By tensor number.
        marks: Names of phases and stages with the number of the first event of each.
        costs: Of the operations while `Tracer.costing` was set.
        unknown: Operations without a rule, with the most bytes that one call handles.
        loose: Deaths that happened outside of every block.
    """

    tensors: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    births: list[Birth] = field(default_factory=list)
    marks: list[tuple[str, int]] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    loose: list[int] = field(default_factory=list)

    def apart(self) -> tuple[Trace, Trace]:
        """The events of the device, with all costs, and those of host memory."""
        if all(b.host is None for b in self.births):
            return self, Trace(marks=[(name, 0) for name, _ in self.marks])
        out = []
        for on_host in (False, True):
            ours = [(b.host is not None) == on_host for b in self.births]
            kept = [e for e, t in enumerate(self.tensors) if ours[t]]
            numbers = {t: n for n, t in enumerate(t for t, own in enumerate(ours) if own)}
            out.append(
                Trace(
                    tensors=[numbers[self.tensors[e]] for e in kept],
                    sizes=[self.sizes[e] for e in kept],
                    places=[self.places[e] for e in kept],
                    births=[b for b, own in zip(self.births, ours, strict=True) if own],
                    marks=[(name, bisect.bisect_left(kept, at)) for name, at in self.marks],
                    costs=[] if on_host else self.costs,
                    unknown={} if on_host else self.unknown,
                )
            )
        return out[0], out[1]

    def peak_bytes(self, begin: int = 0, end: int | None = None) -> int:
        """The most that is alive from one event on and before another."""
        live = peak = sum(self.sizes[:begin])
        for size in self.sizes[begin:end]:
            live += size
            peak = max(peak, live)
        return peak

    def settle(self) -> None:
        """Order deaths that nothing separates by block and birth.

        A cache that is emptied, such as autocast's of converted weights, has no order of its own;
        neither live bytes nor the allocator's free blocks depend on it.
        """
        loose, self.loose = self.loose, []
        borders = {at for _, at in self.marks}
        begin = 0
        for at in range(1, len(loose) + 1):
            goes_on = at < len(loose) and loose[at] == loose[at - 1] + 1
            if goes_on and loose[at] not in borders:
                continue
            stretch = range(loose[begin], loose[at - 1] + 1)
            order = sorted(stretch, key=lambda e: (self.places[e], self.tensors[e]))
            for values in (self.tensors, self.sizes, self.places):
                values[stretch.start : stretch.stop] = [values[e] for e in order]
            begin = at
