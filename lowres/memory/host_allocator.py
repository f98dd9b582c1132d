"""What the host gives for the tensors that wait there: pinned ones get more than they ask for,
those in files nothing.

torch takes pinned memory in powers of two, splits none of it, and keeps what is given back for the
next tensor of the same power. Rounding ends above `pinned_max_round_threshold`, a setting that is
without limit unless somebody sets it.

Source: ATen/core/CachingHostAllocator.h of PyTorch 2.13 (`allocate`, `get_free_block`,
`maybe_cache_block`).
"""

from __future__ import annotations

from collections import Counter

from lowres.memory.trace import Trace


def given_bytes(trace: Trace) -> list[int]:
    """What the host has given after so many events of a trace of what waits there."""
    now = 0
    free: Counter[int] = Counter()
    given = [now]
    for number, size in zip(trace.tensors, trace.sizes, strict=True):
        kind = trace.births[number].host
        if kind != "pinned":
            now += 0 if kind == "mapped" else size
        elif size < 0:
            free[rounded(-size)] += 1
        elif free[rounded(size)]:
            free[rounded(size)] -= 1
        else:
            now += rounded(size)
        given.append(now)
    return given


def disk_bytes(trace: Trace) -> int:
    """Of the tensors that wait in files."""
    return sum(birth.bytes for birth in trace.births if birth.host == "mapped")


def rounded(size_bytes: int) -> int:
    """Up to a power of two."""
    return 1 << (size_bytes - 1).bit_length()
