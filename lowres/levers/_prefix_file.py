"""A table of hidden states on disk: one safetensors file, written once, mapped into memory.

Shapes: N tokens, D hidden.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowres.core.errors import LowresError
from lowres.core.units import format_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = 1
"""Goes into every file's name: another layout is another file."""
KINDS: dict[str, tuple[str, int]] = {
    "float64": ("F64", 8), "float32": ("F32", 4), "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
}  # fmt: skip
"""Name of torch's type, to safetensors' name and bytes."""
_PIECE_BYTES = 1 << 24


class Broken(Exception):
    """A file is not what was written under its name; says in what."""


def name_of(described: Mapping[str, str]) -> str:
    """The file's name: a digest of all that decides on its content."""
    text = json.dumps({"format": FORMAT, **described}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest() + ".safetensors"


def size_bytes(tokens: int, width: int, kind: str) -> int:
    """What the states of so many tokens take."""
    return tokens * width * KINDS[kind][1]


def open_table(path: Path, tokens: int, width: int, kind: str) -> NDArray[Any]:
    """The table (N, D), mapped read-only, as integers of the states' width: numpy lacks bfloat16.

    Raises:
        FileNotFoundError: When there is none.
        Broken: When it is not whole, which reading it once tells.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length) if length < 1 << 20 else b"")
            told = header["__metadata__"]["checksum"]
            found = header["states"]
        except (ValueError, KeyError, TypeError) as error:
            raise Broken("its header cannot be read") from error
    wanted = _entry(tokens, width, kind)
    if found != wanted:
        raise Broken(f"it holds {found}, not {wanted}")
    expected, there = 8 + length + wanted["data_offsets"][1], path.stat().st_size
    if there != expected:
        raise Broken(f"it has {there} bytes instead of {expected}")
    table = _mapped(path, 8 + length, (tokens, width), kind)
    if _checksum(table) != told:
        raise Broken("its content is not what was written")
    return table


def write_table(
    path: Path,
    tokens: int,
    width: int,
    kind: str,
    described: Mapping[str, str],
    portions: Iterable[tuple[int, NDArray[Any]]],
) -> None:
    """Write a table; under its name it is there whole or not at all.

    Args:
        described: Put into the header beside the data, for a reader.
        portions: Place of the first of consecutive tokens, and their states.

    Raises:
        LowresError: When the disk has no room for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    needed, free = size_bytes(tokens, width, kind), shutil.disk_usage(path.parent).free
    if needed > free:
        raise LowresError(
            f"the states of {tokens} tokens take {format_bytes(needed)}, and {path.parent} has "
            f"{format_bytes(free)} left; set LOWRES_CACHE to a folder with room, or drop the lever"
        )
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial")
    try:
        with partial.open("w+b") as file:
            start = file.write(_header(tokens, width, kind, described, "0" * 32))
            for place, states in portions:
                file.seek(start + place * width * KINDS[kind][1])
                file.write(np.ascontiguousarray(states).view(np.uint8).data)
            file.truncate(start + needed)
            file.flush()
            checksum = _checksum(_mapped(partial, start, (tokens, width), kind))
            file.seek(0)
            file.write(_header(tokens, width, kind, described, checksum))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def _entry(tokens: int, width: int, kind: str) -> dict[str, Any]:
    end = size_bytes(tokens, width, kind)
    return {"dtype": KINDS[kind][0], "shape": [tokens, width], "data_offsets": [0, end]}


def _header(
    tokens: int, width: int, kind: str, described: Mapping[str, str], checksum: str
) -> bytes:
    told = {"__metadata__": {**described, "checksum": checksum},
            "states": _entry(tokens, width, kind)}  # fmt: skip
    text = json.dumps(told).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _mapped(path: Path, start: int, shape: tuple[int, int], kind: str) -> NDArray[Any]:
    integers = np.dtype(f"<i{KINDS[kind][1]}")
    return np.memmap(path, dtype=integers, mode="r", offset=start, shape=shape)


def let_go(table: NDArray[Any]) -> None:
    """Forget pages that were read: they would count as resident memory, which a budget limits. The
    system's cache still has them."""
    mapped: Any = getattr(table, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _checksum(table: NDArray[Any]) -> str:
    """Of all bytes, read piece by piece."""
    found = hashlib.blake2b(digest_size=16)
    rows = max(1, _PIECE_BYTES // max(1, table[:1].nbytes))
    for at in range(0, len(table), rows):
        found.update(np.ascontiguousarray(table[at : at + rows]).data)
        let_go(table)
    return found.hexdigest()
