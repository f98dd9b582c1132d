"""What PyTorch's allocator tells of itself, as JSON: its state when memory ran out, its events.

Events can be replayed through the planner's own allocator: what that reserves beside what the real
one took from the driver is the error of the simulation alone, whatever the rehearsal foresaw.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lowres.memory.allocator import replay

MOST_EVENTS = 2_000_000
_TAKES = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
_KEPT = {"alloc", "free_completed", "oom", *_TAKES}


def summary(snapshot: Mapping[str, Any], asked_bytes: int | None = None) -> dict[str, Any]:
    """The segments of `torch.cuda.memory._snapshot()` in a few figures.

    Args:
        asked_bytes: What there was no room for.
    """
    segments = snapshot["segments"]
    free = [(block["size"], segment["segment_type"]) for segment in segments
            for block in segment["blocks"] if block["state"] == "inactive"]  # fmt: skip
    out: dict[str, Any] = {"asked_bytes": asked_bytes}
    for key, name in (("total_size", "reserved_bytes"), ("active_size", "active_bytes"),
                      ("allocated_size", "allocated_bytes")):  # fmt: skip
        out[name] = sum(segment[key] for segment in segments)
    for kind in ("large", "small"):
        own = [segment for segment in segments if segment["segment_type"] == kind]
        out[f"{kind}_segments"] = len(own)
        out[f"{kind}_reserved_bytes"] = sum(segment["total_size"] for segment in own)
    out["free_bytes"] = sum(size for size, _ in free)
    out["free_blocks"] = len(free)
    out["largest_free_bytes"] = sorted((size for size, _ in free), reverse=True)[:8]
    return out


class Watch:
    """Sums the allocator's state up at the moment when it finds no room.

    By the time Python sees the error, autograd has let go of part of what was alive.
    """

    def __init__(self) -> None:
        self.found: dict[str, Any] | None = None
        attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
        if attach is not None and torch.cuda.is_available():
            attach(self._note)

    def _note(self, device: int, asked: int, total: int, free: int) -> None:
        self.found = summary(torch.cuda.memory._snapshot(), asked)

    def told(self) -> dict[str, Any] | None:
        """The state then; where the observer was not called, the state now."""
        if self.found is None and torch.cuda.is_initialized():
            self.found = summary(torch.cuda.memory._snapshot()) | {"when": "after the error"}
        return self.found


def begin_history() -> None:
    """Record events from here; to be complete, before the first allocation of the process."""
    torch.cuda.memory._record_memory_history("all", context=None, max_entries=MOST_EVENTS)


def end_history(capacity_bytes: int | None) -> dict[str, Any]:
    """Stop recording; the trace so far."""
    found = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(None)
    events = found["device_traces"][torch.cuda.current_device()]
    return to_trace(events, capacity_bytes)


def to_trace(entries: Sequence[Mapping[str, Any]], capacity_bytes: int | None) -> dict[str, Any]:
    """Events with a number in place of each address, which is used again and again.

    Args:
        entries: One device's of `device_traces`.
        capacity_bytes: What all segments together were allowed.
    """
    numbers: dict[tuple[bool, int], int] = {}
    events, count = [], 0
    for entry in entries:
        action, address = entry["action"], entry.get("addr", entry.get("device_free", 0))
        if action not in _KEPT:
            continue
        key = (action in _TAKES, address)
        if action in ("alloc", "segment_alloc"):
            numbers[key] = count
            count += 1
        events.append([action, entry["size"], numbers.get(key, -1)])
    return {
        "capacity_bytes": capacity_bytes,
        "complete": len(entries) < MOST_EVENTS,
        "expandable": any(action == "segment_map" for action, _, _ in events),
        "events": events,
    }


def replay_snapshot(trace: Mapping[str, Any]) -> tuple[int, int]:
    """The peaks of reserved memory of a trace, by the planner's allocator and by the real one.

    Args:
        trace: As of `to_trace`: `events` are [action, bytes, number], where the number ties a
            `free_completed` to its `alloc`. A free of something unknown is left out.
    """
    tensors, sizes, alive = [], [], set()
    real = peak = 0
    for action, size, number in trace["events"]:
        if action == "alloc":
            tensors.append(number)
            sizes.append(size)
            alive.add(number)
        elif action == "free_completed" and number in alive:
            tensors.append(number)
            sizes.append(-size)
            alive.remove(number)
        real += _TAKES.get(action, 0) * size
        peak = max(peak, real)
    done = replay(tensors, sizes, trace.get("capacity_bytes"), bool(trace.get("expandable")))
    return done.peak_reserved_bytes, peak


def write_trace(path: Path, trace: Mapping[str, Any]) -> None:
    """Compressed: the events of a step of a large model are ten thousand lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(trace, separators=(",", ":")).encode()
    path.write_bytes(gzip.compress(text, mtime=0))


def read_trace(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return found
