"""The records that a command's arguments name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowres.core.record import RunRecord


def read(places: Iterable[Path]) -> list[RunRecord]:
    """Those of records, of runs' folders, and of folders with records anywhere below; what is named
    twice counts once.

    Raises:
        InputError: Where a record cannot be read, or a folder holds none.
    """
    from lowres.core.errors import InputError
    from lowres.core.record import from_file
    from lowres.run.output import RECORD

    found: dict[Path, RunRecord] = {}
    for place in places:
        there = {}
        for file in _files(place, RECORD):
            try:
                there[file.resolve()] = from_file(file)
            except InputError:
                if place == file or file.name == RECORD:
                    raise
                # JSON of another name may be anything: folders of runs hold other JSON, too.
        if not there:
            raise InputError(f"'{place}'", ["holds no run record; `lowres run` writes record.json"])
        found |= there
    return list(found.values())


def _files(place: Path, record: str) -> list[Path]:
    if not os.path.isdir(place):
        return [place]
    own = place / record
    return [own] if own.is_file() else sorted(place.rglob("*.json"))
