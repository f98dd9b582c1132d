"""The allocator's simulation against an independent slow one, closed forms and invariants.

`Slow` is written from the same rules with another representation: each segment is a list of its
blocks, every search looks at all of them. Closed forms are single rules worked out by hand.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowres.memory.allocator import (
    CachingAllocator,
    OutOfCapacity,
    Replay,
    replay,
    smallest_capacity,
)

MIB = 1 << 20
STEP = 2 * MIB
ENDLESS = 1 << 60

Event = tuple[int, int]
Layout = list[list[tuple[int | str, int]]]  # of each segment: whose block it is, and its size


def up(size: int, unit: int) -> int:
    return (size + unit - 1) // unit * unit


# A slow allocator, and the layout of the fast one


class Slow:
    """Segments by number, in the order of their addresses; each a list of [holder, size]."""

    def __init__(self, capacity: int | None, expandable: bool) -> None:
        self.capacity = ENDLESS if capacity is None else capacity
        self.expandable = expandable
        self.pools: dict[bool, dict[int, list[list]]] = {True: {}, False: {}}  # by "is it small?"
        if expandable:
            self.pools = {small: {0: [["unmapped", ENDLESS]]} for small in (True, False)}
        self.count = 0
        self.retries = 0

    def page(self, small: bool) -> int:
        return (2 if small else 20) * MIB

    def reserved(self) -> int:
        blocks = (b for pool in self.pools.values() for segment in pool.values() for b in segment)
        return sum(size for holder, size in blocks if holder != "unmapped")

    def malloc(self, tensor: int, wanted: int) -> bool:
        size = max(512, up(wanted, 512))
        small = size <= MIB
        place = self.best_fit(small, size) or self.new(small, size)
        if place is None:
            self.retries += 1
            self.empty_cache()
            place = self.new(small, size)
        if place is None:
            return False
        segment, at = place
        blocks = self.pools[small][segment]
        rest = blocks[at][1] - size
        if rest >= 512 if small or self.expandable else rest > MIB:
            blocks[at : at + 1] = [[tensor, size], ["free", rest]]
        else:
            blocks[at][0] = tensor
        return True

    def best_fit(self, small: bool, size: int) -> tuple[int, int] | None:
        found = []
        for number, blocks in self.pools[small].items():
            for at, (holder, free) in enumerate(blocks):
                if holder == "free" and free >= size:
                    grown = free
                    if at + 1 < len(blocks) and blocks[at + 1][0] == "unmapped":
                        grown += blocks[at + 1][1]
                    found.append((free, number, at, grown))
        found.sort()
        while len(found) > 1 and found[1][3] < found[0][3]:
            del found[0]
        return found[0][1:3] if found else None

    def new(self, small: bool, size: int) -> tuple[int, int] | None:
        if self.expandable:
            return self.grow(small, size)
        segment = up(size, STEP) if size >= 10 * MIB else self.page(small)
        if self.reserved() + segment > self.capacity:
            return None
        self.count += 1
        self.pools[small][self.count] = [["free", segment]]
        return self.count, 0

    def grow(self, small: bool, size: int) -> tuple[int, int] | None:
        blocks = self.pools[small][0]
        for hole in [i for i, b in enumerate(blocks) if b[0] == "unmapped"]:
            first = hole - 1 if hole and blocks[hole - 1][0] == "free" else hole
            run = first
            while run < len(blocks) and blocks[run][0] in ("free", "unmapped"):
                run += 1
            if sum(b[1] for b in blocks[first:run]) >= size:
                break
        at, got = first, 0
        while got < size:
            holder, room = blocks[at]
            if holder == "unmapped":
                part = min(room, up(size - got, self.page(small)))
                if self.reserved() + part > self.capacity:
                    self.tidy(blocks)
                    return None
                blocks[at : at + 1] = [["free", part], ["unmapped", room - part]]
                room = part
            got += room
            at += 1 if blocks[at + 1 : at + 2] != [["unmapped", 0]] else 2
        self.tidy(blocks)
        return 0, first

    def free(self, tensor: int) -> None:
        for pool in self.pools.values():
            for blocks in pool.values():
                for block in blocks:
                    if block[0] == tensor:
                        block[0] = "free"
                        self.tidy(blocks)
                        return

    def empty_cache(self) -> None:
        for small, pool in self.pools.items():
            if not self.expandable:
                kept = {n: b for n, b in pool.items() if len(b) > 1 or b[0][0] != "free"}
                self.pools[small] = kept
                continue
            page, start, out = self.page(small), 0, []
            for holder, size in pool[0]:
                low, high = up(start, page), (start + size) // page * page
                if holder == "free" and low < high:
                    out += [["free", low - start], ["unmapped", high - low]]
                    out += [["free", start + size - high]]
                else:
                    out.append([holder, size])
                start += size
            pool[0][:] = out
            self.tidy(pool[0])

    def tidy(self, blocks: list[list]) -> None:
        out: list[list] = []
        for holder, size in (b for b in blocks if b[1]):
            if out and out[-1][0] == holder and isinstance(holder, str):
                out[-1][1] += size
            else:
                out.append([holder, size])
        blocks[:] = out

    def layout(self) -> dict[bool, Layout]:
        return {
            small: [[(b[0], b[1]) for b in blocks] for _, blocks in sorted(pool.items())]
            for small, pool in self.pools.items()
        }


def layout(memory: CachingAllocator) -> dict[bool, Layout]:
    """Blocks of each segment in order of address; fails where they overlap or leave a gap."""
    out: dict[bool, Layout] = {}
    for small, pool in ((True, memory._small), (False, memory._large)):
        blocks: list[tuple[int, int, int | str]] = []
        for tensor, (start, size, requested) in memory._live.items():
            assert size >= up(requested, 512) or not requested
            if size and (size <= MIB) == small:
                blocks.append((start, size, tensor))
        blocks += [(start, size, "free") for start, size in pool.sizes.items()]
        blocks += [(start, end - start, "unmapped") for start, end in pool.holes.items()]
        blocks.sort()
        out[small] = []
        for start, size in sorted(({0: ENDLESS} if pool.page else pool.segments).items()):
            inside = [b for b in blocks if start <= b[0] < start + size]
            ends = [start, *(b[0] + b[1] for b in inside)]
            assert [*(b[0] for b in inside), start + size] == ends
            out[small].append([(b[2], b[1]) for b in inside])
        assert sum(map(len, out[small])) == len(blocks)
    return out


# Random streams

sizes = st.one_of(
    st.sampled_from([1, 512, 513, 700_000, MIB, MIB + 1, 8_519_680, 10 * MIB, 11 * MIB, 20 * MIB]),
    st.integers(1, 3 * MIB),
    st.integers(MIB, 60 * MIB),
)
# What to do (allocate twice as often as free, rarely empty the cache), how much, which one
steps = st.lists(
    st.tuples(st.integers(0, 9), sizes, st.integers(0, 1000)), min_size=15, max_size=60
)
modes = st.booleans()


def events(steps: list[tuple[int, int, int]], lifo: bool = False) -> list[Event]:
    """Events of `replay`; an event of size 0 marks where the cache is emptied."""
    out: list[Event] = []
    live: list[Event] = []
    for number, (action, size, which) in enumerate(steps):
        if action == 9:
            out.append((number, 0))
        elif action < 4 and live:
            tensor, held = live.pop(-1 if lifo else which % len(live))
            out.append((tensor, -held))
        else:
            live.append((number, size))
            out.append(live[-1])
    return out


def columns(stream: list[Event]) -> tuple[list[int], list[int]]:
    return [tensor for tensor, _ in stream], [size for _, size in stream]


def played(stream: list[Event], memory: CachingAllocator) -> Iterator[Event]:
    """Events one by one, after each was carried out."""
    for tensor, size in stream:
        if size > 0:
            memory.malloc(tensor, size)
        elif size < 0:
            memory.free(tensor)
        else:
            memory.empty_cache()
        yield tensor, size


def peak_of_rounded(stream: list[Event]) -> int:
    now = peak = 0
    for _, size in stream:
        now += up(abs(size), 512) * (1 if size > 0 else -1 if size else 0)
        peak = max(peak, now)
    return peak


@settings(deadline=None, max_examples=100)
@given(steps, modes, st.one_of(st.none(), st.integers(0, 100)))
def test_every_decision_equals_the_slow_allocator(
    steps: list[tuple[int, int, int]], expandable: bool, tight: int | None
) -> None:
    """Reference: `Slow`, with capacities from what is alive at the peak to what is reserved."""
    stream = events(steps)
    capacity = None
    if tight is not None:
        least = peak_of_rounded(stream)
        most = replay(*columns(stream), expandable=expandable).peak_reserved_bytes
        capacity = least + (most - least) * tight // 100
    fast, slow = CachingAllocator(capacity, expandable), Slow(capacity, expandable)
    failed: set[int] = set()
    for tensor, size in stream:
        if size > 0:
            fits = slow.malloc(tensor, size)
            try:
                fast.malloc(tensor, size)
            except OutOfCapacity as problem:
                assert problem.size_bytes == size
                failed.add(tensor)
            assert fits == (tensor not in failed)
        elif size < 0 and tensor not in failed:
            slow.free(tensor)
            fast.free(tensor)
        elif size == 0:
            slow.empty_cache()
            fast.empty_cache()
        assert layout(fast) == slow.layout()
        assert (fast.reserved_bytes, fast.retries) == (slow.reserved(), slow.retries)


@settings(deadline=None, max_examples=60)
@given(steps, modes)
def test_blocks_tile_their_segments_and_free_neighbours_are_one(
    steps: list[tuple[int, int, int]], expandable: bool
) -> None:
    """Behaviour: after each event blocks tile, pools are apart, nothing free lies side by side."""
    memory = CachingAllocator(expandable=expandable)
    for _ in played(events(steps), memory):
        reserved = 0
        for small, segments in layout(memory).items():
            for blocks in segments:
                holders = [holder for holder, _ in blocks]
                pairs = list(zip(holders, holders[1:], strict=False))
                assert ("free", "free") not in pairs and ("unmapped", "unmapped") not in pairs
                backed = sum(size for holder, size in blocks if holder != "unmapped")
                assert backed % (memory._small.page or STEP) == 0
                if not expandable:
                    assert backed == STEP if small else backed >= 5 * STEP
                reserved += backed
        assert reserved == memory.reserved_bytes


@settings(deadline=None, max_examples=60)
@given(steps, modes)
def test_meters_are_ordered_and_peaks_are_maxima(
    steps: list[tuple[int, int, int]], expandable: bool
) -> None:
    """Behaviour: requested <= rounded <= allocated <= reserved; the peaks are what was seen."""
    stream = [event for event in events(steps) if event[1]]  # `replay` empties no cache
    memory = CachingAllocator(expandable=expandable)
    live: dict[int, int] = {}
    allocated, reserved = [0], [0]
    for tensor, size in played(stream, memory):
        if size > 0:
            live[tensor] = size
        elif size < 0:
            del live[tensor]
        assert memory.requested_bytes == sum(live.values())
        rounded = sum(up(size, 512) for size in live.values())
        assert rounded <= memory.allocated_bytes <= memory.reserved_bytes
        if expandable:
            assert memory.allocated_bytes == rounded
        allocated.append(memory.allocated_bytes)
        reserved.append(memory.reserved_bytes)
    assert memory.peak_allocated_bytes == max(allocated)
    assert memory.peak_reserved_bytes == max(reserved)
    done = replay(*columns(stream), expandable=expandable)
    assert done == Replay(True, None, max(allocated), max(reserved), 0)


@settings(deadline=None, max_examples=60)
@given(steps, modes)
def test_nothing_is_left_when_everything_is_freed(
    steps: list[tuple[int, int, int]], expandable: bool
) -> None:
    """Behaviour."""
    memory = CachingAllocator(expandable=expandable)
    live = set()
    for tensor, size in played(events(steps), memory):
        (live.add if size > 0 else live.discard)(tensor)
    before = memory.reserved_bytes
    for tensor in live:
        memory.free(tensor)
    assert (memory.allocated_bytes, memory.requested_bytes) == (0, 0)
    assert memory.reserved_bytes == before
    memory.empty_cache()
    assert memory.reserved_bytes == 0


@settings(deadline=None, max_examples=60)
@given(steps, modes, st.integers(0, 5 * MIB))
def test_capacity_bounds(steps: list[tuple[int, int, int]], expandable: bool, spare: int) -> None:
    """Behaviour: what is reserved without a limit is enough, less than what is alive is not."""
    stream = events(steps)
    free = replay(*columns(stream), expandable=expandable)
    enough = replay(*columns(stream), free.peak_reserved_bytes + spare, expandable)
    assert enough == free
    if least := peak_of_rounded(stream):
        short = replay(*columns(stream), least - 1, expandable)
        assert not short.fits and short.retries > 0
        assert short.failed_at is not None and stream[short.failed_at][1] > 0
        assert short.peak_reserved_bytes < least


@settings(deadline=None, max_examples=60)
@given(steps, modes)
def test_the_smallest_capacity_fits_and_one_step_less_does_not(
    steps: list[tuple[int, int, int]], expandable: bool
) -> None:
    """Behaviour: up to 2 GiB the search is exact to one step."""
    stream = columns(events(steps))
    least = smallest_capacity(*stream, expandable)
    assert least % STEP == 0
    assert replay(*stream, least, expandable).fits
    assert least <= replay(*stream, None, expandable).peak_reserved_bytes
    if 0 < least <= 1000 * STEP:
        assert not replay(*stream, least - STEP, expandable).fits


@settings(deadline=None, max_examples=60)
@given(steps)
def test_a_stack_wastes_a_page_of_each_pool_at_most(steps: list[tuple[int, int, int]]) -> None:
    """Behaviour: last in, first out leaves no holes in an expandable segment."""
    stream = columns(events(steps, lifo=True))
    default, expandable = (replay(*stream, expandable=mode) for mode in (False, True))
    assert expandable.peak_reserved_bytes <= default.peak_reserved_bytes + 22 * MIB
    assert expandable.peak_reserved_bytes < expandable.peak_allocated_bytes + 44 * MIB


@settings(deadline=None, max_examples=30)
@given(steps, modes)
def test_arrays_and_lists_give_the_same_each_time(
    steps: list[tuple[int, int, int]], expandable: bool
) -> None:
    """Behaviour."""
    tensors, sizes = columns(events(steps))
    arrays = np.array(tensors, dtype=np.int64), np.array(sizes, dtype=np.int64)
    assert replay(*arrays, expandable=expandable) == replay(tensors, sizes, None, expandable)
    assert smallest_capacity(*arrays, expandable) == smallest_capacity(tensors, sizes, expandable)


# One rule at a time


@pytest.mark.parametrize(
    "request_bytes, allocated, reserved",
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),  # the small pool ends here, inclusive
        (MIB + 1, MIB + 512, 20 * MIB),
        (8_519_680, 8_519_680, 20 * MIB),  # the cuBLAS workspace before Hopper, 8.125 MiB
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB, 10 * MIB),  # rounded first, then a segment of its own
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),  # 1 MiB and 512 bytes left over: split
        (11 * MIB, 12 * MIB, 12 * MIB),  # exactly 1 MiB left over: not split
        (12 * MIB - 1, 12 * MIB, 12 * MIB),
    ],
)
def test_one_allocation(request_bytes: int, allocated: int, reserved: int) -> None:
    """Closed form: block and segment of a single request."""
    memory = CachingAllocator()
    memory.malloc(0, request_bytes)
    meters = memory.requested_bytes, memory.allocated_bytes, memory.reserved_bytes
    assert meters == (request_bytes, allocated, reserved)


@pytest.mark.parametrize(
    "request_bytes, allocated, reserved",
    [
        (1, 512, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (11 * MIB, 11 * MIB, 20 * MIB),
        (20 * MIB + 1, 20 * MIB + 512, 40 * MIB),
    ],
)
def test_one_allocation_in_an_expandable_segment(
    request_bytes: int, allocated: int, reserved: int
) -> None:
    """Closed form: pages of 2 and of 20 MiB, and a split at 512 bytes."""
    memory = CachingAllocator(expandable=True)
    memory.malloc(0, request_bytes)
    assert (memory.allocated_bytes, memory.reserved_bytes) == (allocated, reserved)


@pytest.mark.parametrize("expandable", [False, True])
def test_zero_bytes_take_nothing(expandable: bool) -> None:
    """Behaviour."""
    memory = CachingAllocator(0, expandable)
    memory.malloc(7, 0)
    memory.free(7)
    memory.malloc(7, 0)
    assert (memory.allocated_bytes, memory.reserved_bytes) == (0, 0)
    assert replay([1, 2], [0, 0], 0) == Replay(True, None, 0, 0, 0)
    assert smallest_capacity([], []) == 0


def test_small_blocks_share_a_segment_until_it_is_full() -> None:
    """Closed form: two of 1 MiB fill 2 MiB, the third opens the next."""
    memory = CachingAllocator()
    for tensor, reserved in enumerate((2, 2, 4)):
        memory.malloc(tensor, MIB)
        assert memory.reserved_bytes == reserved * MIB


def test_pools_never_exchange_blocks() -> None:
    """Closed form: 19 MiB cached in the large pool do not serve 512 bytes."""
    memory = CachingAllocator()
    memory.malloc(0, 2 * MIB)
    memory.malloc(1, 1)
    assert memory.reserved_bytes == 22 * MIB


@pytest.mark.parametrize("size, allocated", [(30, 30), (29, 30), (28, 28)])
def test_a_cached_block_is_charged_whole_when_its_rest_is_too_small(
    size: int, allocated: int
) -> None:
    """Closed form: from cached 30 MiB, 29 count as 30; 28 leave more than 1 over."""
    memory = with_cached([30])
    memory.malloc(1, size * MIB)
    assert (memory.allocated_bytes, memory.reserved_bytes) == (allocated * MIB, 30 * MIB)


def with_cached(sizes_mib: list[int]) -> CachingAllocator:
    """Cached blocks of these sizes, each in a segment of its own."""
    memory = CachingAllocator()
    for tensor, size in enumerate(sizes_mib):
        memory.malloc(tensor, size * MIB)
    for tensor in range(len(sizes_mib)):
        memory.free(tensor)
    return memory


def test_the_smallest_adequate_block_is_taken_and_of_equals_the_lowest() -> None:
    """Closed form: of 40, 14, 24, 24 MiB a request of 20 takes the first 24."""
    memory = with_cached([40, 14, 24, 24])
    starts = sorted(memory._large.sizes)
    memory.malloc(9, 20 * MIB)
    assert memory._live[9][0] == starts[2]
    assert memory.reserved_bytes == 102 * MIB


def test_of_equal_holes_in_an_expandable_segment_the_lowest_is_taken() -> None:
    """Closed form: holes of 24, 6 and 6 MiB between blocks in use; 5 go to the first 6."""
    memory = CachingAllocator(expandable=True)
    for tensor, size in enumerate((24, 2, 6, 2, 6, 2)):
        memory.malloc(tensor, size * MIB)
    for tensor in (0, 2, 4):
        memory.free(tensor)
    memory.malloc(9, 5 * MIB)
    assert memory._live[9][0] == 26 * MIB


def test_free_neighbours_merge_on_both_sides() -> None:
    """Closed form: three of 4 MiB in one segment come back as the 20 MiB they were cut from."""
    memory = CachingAllocator()
    for tensor in range(3):
        memory.malloc(tensor, 4 * MIB)
    for tensor in (0, 2, 1):
        memory.free(tensor)
    assert layout(memory)[False] == [[("free", 20 * MIB)]]


def test_blocks_of_two_segments_do_not_merge() -> None:
    """Closed form: two cached 10 MiB do not hold 20."""
    memory = with_cached([10, 10])
    memory.malloc(5, 20 * MIB)
    assert memory.reserved_bytes == 40 * MIB


def test_an_unsplit_cached_segment_of_either_pool_is_released_before_failing() -> None:
    """Closed form: 20 and 2 MiB cached, 40 allowed; a request of 30 empties the cache once."""
    memory = CachingAllocator(40 * MIB)
    for tensor, size in ((0, 20 * MIB), (1, 1)):
        memory.malloc(tensor, size)
        memory.free(tensor)
    memory.malloc(2, 30 * MIB)
    assert (memory.reserved_bytes, memory.retries) == (30 * MIB, 1)
    assert memory.peak_reserved_bytes == 30 * MIB
    # 10 and 20 MiB more are too much: counted as a retry too, and nothing is held.
    for size, retries in ((10 * MIB + 1, 2), (20 * MIB, 3)):
        with pytest.raises(OutOfCapacity) as problem:
            memory.malloc(3, size)
        assert (problem.value.size_bytes, memory.retries) == (size, retries)
    memory.malloc(3, 10 * MIB)
    assert (memory.allocated_bytes, memory.reserved_bytes) == (40 * MIB, 40 * MIB)


def test_a_partly_used_segment_is_never_returned() -> None:
    """Closed form: 4 MiB in use keep 20 reserved; 24 do not fit into 40, though 36 are free."""
    memory = CachingAllocator(40 * MIB)
    memory.malloc(0, 4 * MIB)
    memory.malloc(1, 12 * MIB - 1)
    memory.free(1)
    memory.empty_cache()
    assert memory.reserved_bytes == 20 * MIB
    with pytest.raises(OutOfCapacity):
        memory.malloc(2, 24 * MIB)
    assert (memory.reserved_bytes, memory.retries) == (20 * MIB, 1)
    assert replay([0, 1, 1, 2], [4 * MIB, MIB + 1, -MIB - 1, 24 * MIB], 40 * MIB) == Replay(
        False, 3, 5 * MIB + 512, 20 * MIB, 1
    )


def test_an_expandable_segment_grows_from_its_cached_end() -> None:
    """Closed form: of 20 mapped MiB 12 are used and freed; 30 need one page more."""
    memory = CachingAllocator(expandable=True)
    memory.malloc(0, 12 * MIB)
    memory.free(0)
    memory.malloc(1, 30 * MIB)
    assert memory.reserved_bytes == 40 * MIB
    assert memory._live[1][0] == 0


def test_only_whole_pages_are_unmapped_and_the_hole_is_filled_first() -> None:
    """Closed form: 10 to 40 MiB are free, the page from 20 to 40 goes; 25 MiB then start at 10."""
    memory = CachingAllocator(expandable=True)
    for tensor, size in enumerate((10, 30, 10)):
        memory.malloc(tensor, size * MIB)
    memory.free(1)
    memory.empty_cache()
    assert memory.reserved_bytes == 40 * MIB  # the pages of 0 to 20 and 40 to 60
    memory.malloc(3, 25 * MIB)
    assert memory.reserved_bytes == 60 * MIB
    assert memory._live[3][0] == 10 * MIB


def test_neighbouring_holes_become_one() -> None:
    """Closed form: pages are unmapped one after the other, the middle one last."""
    memory = CachingAllocator(expandable=True)
    for tensor in range(4):
        memory.malloc(tensor, 20 * MIB)
    for tensor in (0, 2, 1):
        memory.free(tensor)
        memory.empty_cache()
    blocks = [("unmapped", 60 * MIB), (3, 20 * MIB), ("unmapped", ENDLESS - 80 * MIB)]
    assert layout(memory)[False] == [blocks]


def test_a_hole_is_preferred_to_the_end_that_could_grow() -> None:
    """Closed form: 20 MiB go into the 30 at the start, though the 25 at the end fit better."""
    memory = CachingAllocator(expandable=True)
    for tensor, size in enumerate((30, 5, 25)):
        memory.malloc(tensor, size * MIB)
    for tensor in (0, 2):
        memory.free(tensor)
    memory.malloc(3, 20 * MIB)
    assert memory._live[3][0] == 0


def test_a_failed_growth_keeps_what_it_mapped_until_the_retry_releases_it() -> None:
    """Closed form, in MiB: hole 0-20, cached 20-40, hole 40-60, 60 in use behind. 50 need both
    holes, 100 allow one: it is mapped, then all of 0-40 released, and 60 more are too much.
    """
    memory = CachingAllocator(100 * MIB, expandable=True)
    for tensor in range(4):
        memory.malloc(tensor, 20 * MIB)
    memory.free(0)
    memory.free(2)
    memory.empty_cache()
    memory.malloc(4, 30 * MIB)  # fits into neither hole: two pages at the end
    memory.free(1)
    assert (memory.reserved_bytes, memory.peak_reserved_bytes) == (80 * MIB, 80 * MIB)
    with pytest.raises(OutOfCapacity):
        memory.malloc(5, 50 * MIB)
    assert (memory.reserved_bytes, memory.peak_reserved_bytes) == (60 * MIB, 100 * MIB)
    memory.malloc(5, 40 * MIB)
    assert memory._live[5][0] == 0
