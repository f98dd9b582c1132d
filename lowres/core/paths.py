"""Where data files are looked for, and where caches lie."""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT_DATA = "../shared/data"
"""Looked for from the working folder; `LOWRES_DATA` names another one."""


def data_folder() -> Path:
    return Path(os.environ.get("LOWRES_DATA", DEFAULT_DATA))


def cache_folder() -> Path:
    """Where what can be made again is kept: `LOWRES_CACHE`, else in the user's cache folder."""
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LOWRES_CACHE") or Path(users, "lowres")).expanduser()


def find(name: str) -> Path | None:
    """A file or folder as named, else under the data folder, else None."""
    for candidate in (Path(name).expanduser(), data_folder() / name):
        if candidate.exists():
            return candidate
    return None
