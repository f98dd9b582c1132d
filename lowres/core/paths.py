"""Where data files are looked for."""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT_DATA = "../shared/data"
"""Looked for from the working folder; `LOWRES_DATA` names another one."""


def data_folder() -> Path:
    return Path(os.environ.get("LOWRES_DATA", DEFAULT_DATA))


def find(name: str) -> Path | None:
    """A file or folder as named, else under the data folder, else None."""
    for candidate in (Path(name).expanduser(), data_folder() / name):
        if candidate.exists():
            return candidate
    return None
