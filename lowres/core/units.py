"""Bytes and seconds for people. GiB is 2^30 bytes everywhere in lowres."""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


def gib_to_bytes(gib: float) -> int:
    return round(gib * GIB)


def format_bytes(count_bytes: int | float | None) -> str:
    """`1.50 GiB`, `12.3 MiB`, `640 KiB`, `12 B`; `-` for None."""
    if count_bytes is None:
        return "-"
    size = abs(count_bytes)
    if size >= GIB:
        return f"{count_bytes / GIB:.2f} GiB"
    if size >= MIB:
        return f"{count_bytes / MIB:.1f} MiB"
    if size >= KIB:
        return f"{count_bytes / KIB:.0f} KiB"
    return f"{count_bytes:.0f} B"


def format_seconds(seconds: float | None) -> str:
    """`1:02:03`, `2:03`, `1.50 s`, `12.3 ms`; `-` for None."""
    if seconds is None:
        return "-"
    if seconds >= 3600:
        return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"
    if seconds >= 60:
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1000:.1f} ms"


def format_count(count: int | float) -> str:
    """`1.24 B`, `22.71 M`, `74.1 k`, `12`."""
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.2f} {name}"
    return f"{count:.0f}"
