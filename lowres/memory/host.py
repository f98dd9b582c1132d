"""Bytes in host memory while the trace of another device goes on."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from lowres.core.plan import PHASES, PlanPhase
from lowres.memory.work import cost_of

if TYPE_CHECKING:
    from lowres.memory.tracer import Tracer

aten = torch.ops.aten


class HostLedger:
    """Counts storages by the block that they belong to; the peak of each phase is kept."""

    def __init__(self) -> None:
        self._alive: Counter[int] = Counter()
        self._now_bytes = 0
        self._watches: dict[int, weakref.finalize[Any, Any]] = {}
        self._places: dict[int, int] = {}
        self._phase = ""
        self._peaks: dict[str, tuple[int, Counter[int]]] = {"": (0, Counter())}

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._watches

    def place(self, tensor: torch.Tensor) -> int | None:
        """The block that a tensor belongs to; None of one that is not on the host."""
        return self._places.get(tensor.untyped_storage()._cdata)

    def note(self, tensor: torch.Tensor, place: int) -> None:
        """Count a tensor's storage from now until it dies."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._watches or not size:
            return
        self._watches[key] = weakref.finalize(storage, self._gone, key, size)
        self._places[key] = place
        self._alive[place] += size
        self._now_bytes += size
        if self._now_bytes > self._peaks[self._phase][0]:
            self._peaks[self._phase] = self._now_bytes, self._alive.copy()

    def move(self, tensor: torch.Tensor, place: int) -> None:
        """A buffer serves another block from now on."""
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._alive[self._places[storage._cdata]] -= size
        self._places[storage._cdata] = place
        self._alive[place] += size

    def forget(self, tensor: torch.Tensor) -> None:
        """It went to the device after all."""
        watch = self._watches.get(tensor.untyped_storage()._cdata)
        if watch is not None:
            watch()

    def mark(self, name: str) -> None:
        """A phase begins."""
        self._phase = name
        self._peaks[name] = self._now_bytes, self._alive.copy()

    def peaks(self, left_out: Counter[int]) -> dict[PlanPhase, int]:
        """The most bytes that each phase held; 0 of a phase that was not traced.

        Args:
            left_out: By place of a traced block: blocks like it that were not traced.
        """
        out: dict[PlanPhase, int] = {}
        for phase in PHASES:
            total, alive = self._peaks.get(phase, self._peaks[""])
            out[phase] = total + sum(alive[place] * n for place, n in left_out.items())
        return out

    def _gone(self, key: int, size: int) -> None:
        del self._watches[key]
        self._alive[self._places.pop(key)] -= size
        self._now_bytes -= size


def note_on_host(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """An operation that the host computes, or that copies to it or from it."""
    place = tracer.place_by(args, None)
    if func is aten.copy_.default and args[0] in tracer.host and args[1] not in tracer.host:
        place = tracer.place_by(args[1:], None)
        tracer.host.move(args[0], place)
    for leaf in tree_leaves(out):
        if isinstance(leaf, torch.Tensor) and tracer.number(leaf) is None:
            tracer.host.note(leaf, place)
    if tracer.costing:
        cost = cost_of(func, args, kwargs, out, place, tracer.stage, tracer.is_fixed)
        if cost is not None:
            # A copy goes over the bus once; it was counted read and written.
            moved = cost.bytes // 2 if func is aten.copy_.default else cost.bytes
            tracer.trace.costs.append(replace(cost, kind="transfer", bytes=moved))
