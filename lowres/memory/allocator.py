"""The caching allocator of PyTorch on CUDA, simulated: one device, one stream, with a capacity.

It answers what a sum of tensor sizes cannot: how much memory a stream of allocations and frees
reserves, and the least that it runs in, with default settings or with expandable segments.

Source: c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h of PyTorch. The constants
were compared with the header that torch 2.13 ships.

Departs from the source: the address space of an expandable segment never ends (it is 9/8 of the
device's memory there). Segments lie at ascending addresses; there the driver places them, which
decides between free blocks of one size in two segments. A capacity is what the driver has to give,
not a memory fraction, which counts a default segment even where an expandable one maps less.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from lowres.core.units import MIB

# The names of c10/core/AllocatorConfig.h are in brackets.
_GRAIN = 512  # every block is a multiple of it (kMinBlockSize)
_SMALL = MIB  # largest block of the small pool (kSmallSize)
_SMALL_SEGMENT = 2 * MIB  # (kSmallBuffer)
_LARGE_SEGMENT = 20 * MIB  # (large_segment_size)
_OWN_SEGMENT = 10 * MIB  # from here on a block has a segment of its own (kMinLargeAlloc) ...
_STEP = 2 * MIB  # ... of a multiple of this (kRoundLarge)

_ENDLESS = 1 << 60  # bytes; more than any device has
_SHIFT, _ADDRESS = 64, (1 << 64) - 1  # a key holds a size above an address


class OutOfCapacity(Exception):
    """There is no room for `size_bytes`, even after the cache was emptied."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self.size_bytes = size_bytes


class _Pool:
    """The free memory of one pool: cached blocks, and address space that could be mapped.

    Args:
        page: An expandable segment grows by multiples of it; 0 for segments of fixed size.
        least_rest: The smallest remainder that is split off a block.
    """

    def __init__(self, page: int, least_rest: int) -> None:
        self.page, self.least_rest = page, least_rest
        self.keys: list[int] = []  # of the cached blocks, by size, then address
        self.sizes: dict[int, int] = {}  # by the address where a cached block starts
        self.starts: dict[int, int] = {}  # by the address where it ends
        self.segments: dict[int, int] = {}  # sizes of those of fixed size
        self.top = 0  # where the next of them starts
        self.holes = {0: _ENDLESS} if page else {}  # unmapped: where one ends, by where it starts

    def add(self, start: int, size: int) -> None:
        insort(self.keys, size << _SHIFT | start)
        self.sizes[start] = size
        self.starts[start + size] = start

    def remove(self, start: int) -> int:
        size = self.sizes.pop(start)
        del self.starts[start + size]
        del self.keys[bisect_left(self.keys, size << _SHIFT | start)]
        return size

    def merge(self, start: int, size: int) -> None:
        """Add a block, made one with the cached blocks on both sides."""
        end = start + size
        if end in self.sizes:
            size += self.remove(end)
        if start in self.starts:
            start = self.starts[start]
            size += self.remove(start)
        self.add(start, size)

    def best_fit(self, size: int) -> tuple[int, int] | None:
        """Take the smallest cached block that is large enough, the lowest of equals.

        A block beside unmapped space counts with the size it can grow to, so that holes are filled
        before the end of a segment; the search ends at the first block that is no better.
        """
        keys = self.keys
        at = bisect_left(keys, size << _SHIFT)
        if at == len(keys):
            return None
        if self.holes:
            while at + 1 < len(keys) and self.reach(keys[at + 1]) < self.reach(keys[at]):
                at += 1
        start = keys[at] & _ADDRESS
        return start, self.remove(start)

    def reach(self, key: int) -> int:
        size = key >> _SHIFT
        end = (key & _ADDRESS) + size
        return size + self.holes.get(end, end) - end

    def room(self, size: int) -> list[tuple[int, int]]:
        """Cached blocks and holes, each start and end, of the lowest run that `size` fits in."""
        for hole in sorted(self.holes):
            at = start = self.starts.get(hole, hole)
            run = []
            while at - start < size and (at in self.holes or at in self.sizes):
                end = self.holes[at] if at in self.holes else at + self.sizes[at]
                run.append((at, end))
                at = end
            if at - start >= size:
                break
        return run  # the last hole is large enough


class CachingAllocator:
    """The allocator's state, in bytes. A tensor is any number that the caller gives it.

    Args:
        capacity_bytes: What all segments together may take; None for no limit.
        expandable: Whether `expandable_segments` is on.
    """

    def __init__(self, capacity_bytes: int | None = None, expandable: bool = False) -> None:
        self.capacity_bytes = _ENDLESS if capacity_bytes is None else int(capacity_bytes)
        self.allocated_bytes = self.reserved_bytes = self.requested_bytes = 0
        self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self.retries = 0  # times that the cache was emptied to make room, in vain or not
        # A large block of a fixed segment is split when more than 1 MiB would be left over.
        self._small = _Pool(_SMALL_SEGMENT if expandable else 0, _GRAIN)
        self._large = _Pool(*((_LARGE_SEGMENT, _GRAIN) if expandable else (0, _SMALL + _GRAIN)))
        self._live: dict[int, tuple[int, int, int]] = {}  # start, size, size asked for

    def malloc(self, tensor: int, size_bytes: int) -> None:
        """Allocate. Zero bytes take nothing. An allocation that raises holds nothing."""
        assert tensor not in self._live, f"tensor {tensor} is alive already"
        if size_bytes == 0:
            self._live[tensor] = 0, 0, 0
            return
        size = (size_bytes + _GRAIN - 1) & -_GRAIN
        pool = self._small if size <= _SMALL else self._large
        block = pool.best_fit(size) or self._new(pool, size)
        if block is None:
            self.retries += 1
            self.empty_cache()
            block = self._new(pool, size)
        if block is None:
            raise OutOfCapacity(size_bytes)
        start, taken = block
        if taken - size >= pool.least_rest:
            pool.add(start + size, taken - size)
            taken = size
        self._live[tensor] = start, taken, size_bytes
        self.requested_bytes += size_bytes
        self.allocated_bytes += taken
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes

    def free(self, tensor: int) -> None:
        """Put the tensor's block into the cache."""
        start, size, requested = self._live.pop(tensor)
        if size:
            self.requested_bytes -= requested
            self.allocated_bytes -= size
            # Blocks of the small pool are cut to size, so that the size of a block tells its pool.
            (self._small if size <= _SMALL else self._large).merge(start, size)

    def empty_cache(self) -> None:
        """Return to the driver what is wholly free: unsplit segments, or pages."""
        for pool in (self._large, self._small):
            for start, size in list(pool.sizes.items()):
                if pool.page:
                    self._unmap(pool, start, start + size)
                elif pool.segments.get(start) == size:
                    pool.remove(start)
                    self.reserved_bytes -= pool.segments.pop(start)

    def _new(self, pool: _Pool, size: int) -> tuple[int, int] | None:
        """A block of new memory, in no list, as start and size; None when there is too little."""
        if pool.page:
            return self._grow(pool, size)
        segment = _SMALL_SEGMENT if size <= _SMALL else _LARGE_SEGMENT
        if size >= _OWN_SEGMENT:
            segment = -(-size // _STEP) * _STEP
        if not self._take(segment):
            return None
        start = pool.top
        pool.segments[start] = segment
        pool.top += segment + _GRAIN  # the gap keeps blocks of two segments apart
        return start, segment

    def _grow(self, pool: _Pool, size: int) -> tuple[int, int] | None:
        run = pool.room(size)
        first = run[0][0]
        for start, end in run:
            if start in pool.holes:
                # Whole pages, all at once or none; only the last hole may keep some.
                needed = min(end, -(-(first + size) // pool.page) * pool.page)
                if not self._take(needed - start):
                    return None  # what was mapped before stays in the cache
                del pool.holes[start]
                if needed < end:
                    pool.holes[needed] = end
                pool.merge(start, needed - start)
        return first, pool.remove(first)

    def _take(self, size: int) -> bool:
        if self.reserved_bytes + size > self.capacity_bytes:
            return False
        self.reserved_bytes += size
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return True

    def _unmap(self, pool: _Pool, start: int, end: int) -> None:
        low, high = -(-start // pool.page) * pool.page, end // pool.page * pool.page
        if low >= high:
            return
        self.reserved_bytes -= high - low
        pool.remove(start)
        if start < low:
            pool.add(start, low - start)
        if high < end:
            pool.add(high, end - high)
        for hole in [begin for begin, stop in pool.holes.items() if stop == low]:
            low = hole
        pool.holes[low] = pool.holes.pop(high, high)


@dataclass(frozen=True)
class Replay:
    """What a stream of events came to; `failed_at` is the event that found no room."""

    fits: bool
    failed_at: int | None
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    retries: int


def replay(
    tensors: Sequence[int],
    sizes: Sequence[int],
    capacity_bytes: int | None = None,
    expandable: bool = False,
) -> Replay:
    """Run events through a fresh allocator, until one finds no room.

    Args:
        tensors: The tensor of each event.
        sizes: Bytes that the event allocates; negative when it frees them. An event of 0 is none.
        capacity_bytes: As of `CachingAllocator`; so is `expandable`.
    """
    memory = CachingAllocator(capacity_bytes, expandable)
    failed_at = None
    # The items of an array are slow to compute with; Python's numbers are not.
    for index, (tensor, size) in enumerate(zip(map(int, tensors), map(int, sizes), strict=True)):
        if size < 0:
            memory.free(tensor)
        elif size:
            try:
                memory.malloc(tensor, size)
            except OutOfCapacity:
                failed_at = index
                break
    peaks = memory.peak_allocated_bytes, memory.peak_reserved_bytes
    return Replay(failed_at is None, failed_at, *peaks, memory.retries)


def smallest_capacity(
    tensors: Sequence[int], sizes: Sequence[int], expandable: bool = False
) -> int:
    """The least capacity found with which the events of `replay` fit, a multiple of 2 MiB.

    Bisection between what live blocks add up to and what is reserved without a limit. The result
    fits; some capacity less by 2 MiB, or by up to 0.1 % where that is more, does not. Fitting is
    not quite monotone: a smaller one may fit by luck of the layout, and is not looked for.
    """
    tensors, sizes = list(map(int, tensors)), list(map(int, sizes))
    fits = replay(tensors, sizes, None, expandable).peak_reserved_bytes
    blocks = ((size + _GRAIN - 1 if size > 0 else size) & -_GRAIN for size in sizes)
    fails = (-(-max(accumulate(blocks), default=0) // _STEP) - 1) * _STEP
    while fits - fails > max(_STEP, fits // 1000):
        middle = (fits + fails) // 2 // _STEP * _STEP
        done = replay(tensors, sizes, middle, expandable)
        if done.fits:
            fits = done.peak_reserved_bytes  # as the capacity, it would change no decision
        else:
            fails = middle
    return fits
