"""From the trace of a few blocks to that of all of them.

Blocks that are built alike make the same allocations in the same order, and what they free belongs
to them or to a neighbour. So the events of one inner block, copied with its references moved along,
are the events of the blocks that were left out: every instant of the full depth is there, with its
order, and an allocator can be replayed over it. That two inner blocks do repeat is checked, not
assumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lowres.memory.trace import OUTSIDE, Trace


class DoesNotRepeat(Exception):
    """Two inner blocks of a run behave differently; the full depth has to be traced."""


def extend(trace: Trace, first: int, copies: int) -> Trace:
    """Put copies of a block between it and its neighbour above.

    Args:
        trace: With places of all traced blocks.
        first: Place of the block; it and `first + 1` must repeat, and lie inside of a run.
        copies: How many blocks were left out.

    Raises:
        DoesNotRepeat: When the two are not alike, naming where they differ.
    """
    if copies == 0:
        return trace
    second = first + 1
    ordinals = _ordinals(trace)
    pieces = _pieces(trace.places)
    ours = [p for p in pieces if p[0] == first]
    theirs = [p for p in pieces if p[0] == second]
    if len(ours) != len(theirs):
        raise DoesNotRepeat(f"blocks work in {len(ours)} and {len(theirs)} portions")
    told = [
        _agreed(_relative(trace, ordinals, mine), _relative(trace, ordinals, other), number)
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=True))
    ]

    out = Trace(births=list(trace.births), unknown=dict(trace.unknown))
    of: dict[tuple[int, int], int] = {}
    """(place, ordinal) to tensor, with the copies in places of their own."""
    for tensor, (place, ordinal) in ordinals.items():
        of[place if place <= first else place + copies, ordinal] = tensor
    marks = list(trace.marks)
    number = inserted = 0
    for at, (place, begin, end) in enumerate(pieces):
        # Marks fall on borders of pieces or inside; they move with the event they precede.
        downward = place == first and at > 0 and pieces[at - 1][0] == second
        upward = place == second and at > 0 and pieces[at - 1][0] == first
        if upward or downward:
            order = range(1, copies + 1) if upward else range(copies, 0, -1)
            for copy in order:
                _append_copy(
                    out, of, told[number - 1 if upward else number], first, first + copy, trace
                )
            inserted += 1
        for event in range(begin, end):
            while marks and marks[0][1] <= event:
                out.marks.append((marks.pop(0)[0], len(out.tensors)))
            tensor = trace.tensors[event]
            owner, ordinal = ordinals[tensor]
            if (place, owner) == (second, first):
                # What this block's neighbour below left it, is now the last copy's.
                tensor = of[first + copies, ordinal]
            elif (place, owner) == (first, second):
                tensor = of[first + 1, ordinal]
            out.tensors.append(tensor)
            out.sizes.append(trace.sizes[event])
            out.places.append(_moved(trace.places[event], first, copies))
            if owner == first and place not in (first - 1, first, second):
                # A list of all blocks' results is let go by somebody else.
                for copy in range(1, copies + 1):
                    out.tensors.append(of[first + copy, ordinal])
                    out.sizes.append(trace.sizes[event])
                    out.places.append(out.places[-1])
        if place == first:
            number += 1
    if inserted != len(ours):
        raise DoesNotRepeat("something else happens between two neighbours")
    _stop_at_survivors(out, of, first, copies)
    out.marks += [(name, len(out.tensors)) for name, _ in marks]
    for tensor, birth in enumerate(trace.births):
        out.births[tensor] = replace(birth, place=_moved(birth.place, first, copies))
    out.costs = [replace(c, place=_moved(c.place, first, copies)) for c in trace.costs]
    for copy in range(1, copies + 1):
        out.costs += [replace(c, place=first + copy) for c in trace.costs if c.place == first]
    return out


def _stop_at_survivors(out: Trace, of: dict[tuple[int, int], int], first: int, copies: int) -> None:
    """A copy's tensor dies when that of the block it is a copy of does."""
    dead = {tensor for tensor, size in zip(out.tensors, out.sizes, strict=True) if size < 0}
    for (place, ordinal), tensor in of.items():
        if first < place <= first + copies and (tensor in dead) != (of[first, ordinal] in dead):
            raise DoesNotRepeat("what a block makes is let go in different ways")


def _moved(place: int, first: int, copies: int) -> int:
    return place + copies if place > first else place


def _ordinals(trace: Trace) -> dict[int, tuple[int, int]]:
    """Tensor to (place, number among the births of that place)."""
    counts: Counter[int] = Counter()
    out = {}
    for tensor, birth in enumerate(trace.births):
        out[tensor] = (birth.place, counts[birth.place])
        counts[birth.place] += 1
    return out


def _pieces(places: Sequence[int]) -> list[tuple[int, int, int]]:
    """Maximal stretches of one place: (place, first event, end)."""
    out = []
    begin = 0
    for at in range(1, len(places) + 1):
        if at == len(places) or places[at] != places[begin]:
            out.append((places[begin], begin, at))
            begin = at
    return out


Told = list[tuple[int, int, int]]
"""Events without absolute numbers: (size, distance of the owner's place, ordinal there)."""


def _relative(
    trace: Trace, ordinals: dict[int, tuple[int, int]], piece: tuple[int, int, int]
) -> Told:
    place, begin, end = piece
    told: Told = []
    for event in range(begin, end):
        owner, ordinal = ordinals[trace.tensors[event]]
        distance = owner - place
        if owner == OUTSIDE or abs(distance) > 1:
            raise DoesNotRepeat(
                f"block {place} frees what {trace.births[trace.tensors[event]].operation} made "
                "elsewhere"
            )
        told.append((trace.sizes[event], distance, ordinal))
    return told


def _agreed(mine: Told, theirs: Told, number: int) -> Told:
    """What both blocks do. What is owned outside of the two is numbered as an inner block does it:
    the first and the last block of a run may have made more or fewer tensors.
    """
    if len(mine) != len(theirs):
        raise DoesNotRepeat(f"portion {number} has {len(mine)} and {len(theirs)} events")
    out: Told = []
    for at, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if a[:2] != b[:2] or (a[1] == 0 and a != b):
            raise DoesNotRepeat(f"portion {number}, event {at}: {a} and {b}")
        out.append(b if a[1] < 0 else a)
    return out


def _append_copy(
    out: Trace, of: dict[tuple[int, int], int], told: Told, first: int, place: int, trace: Trace
) -> None:
    for size, distance, ordinal in told:
        key = (place + distance, ordinal)
        if size > 0:
            of[key] = len(out.births)
            out.births.append(replace(trace.births[of[first, ordinal]], place=place))
        elif key not in of:
            raise DoesNotRepeat("a block frees what it made while another was at work")
        out.tensors.append(of[key])
        out.sizes.append(size)
        out.places.append(place)
