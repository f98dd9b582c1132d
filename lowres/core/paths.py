"""Where data files are looked for, where caches lie, and where a file can be written."""

from __future__ import annotations

import os
from pathlib import Path

from lowres.core.errors import InputError

DEFAULT_DATA = "../shared/data"
"""Looked for from the working folder; `LOWRES_DATA` names another one."""


def data_folder() -> Path:
    return Path(os.environ.get("LOWRES_DATA") or DEFAULT_DATA).expanduser()


def cache_folder() -> Path:
    """Where what can be made again is kept: `LOWRES_CACHE`, else in the user's cache folder."""
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LOWRES_CACHE") or Path(users, "lowres")).expanduser()


def stop_if_unwritable(path: Path, *, makes_folders: bool = False) -> None:
    """Look at the place of a file before the work whose result it will hold.

    Args:
        makes_folders: The writer makes the folders that are missing.

    Raises:
        InputError: When a file cannot be written there.
    """
    folder = path.parent
    # `os.path` takes what lies in a folder that may not be entered for not there.
    while makes_folders and not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    if os.path.isdir(path):
        why = "it is a folder; name a file in it"
    elif not os.path.exists(folder):
        why = f"there is no folder '{folder}'; make it, or name another"
    elif not os.path.isdir(folder):
        why = f"'{folder}' is no folder; name another"
    elif not os.access(path if os.path.exists(path) else folder, os.W_OK):
        why = "it is not permitted; name another place"
    else:
        return
    raise InputError(f"'{path}'", [f"cannot be written: {why}"])


def write_whole(path: Path, text: str) -> None:
    """Write a file aside and rename it: a reader never sees half of it, and where it cannot be
    written, what was there stays.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def find(name: str) -> Path | None:
    """A file or folder as named, else under the data folder, else None."""
    for candidate in (Path(name).expanduser(), data_folder() / name):
        if os.path.exists(candidate):
            return candidate
    return None
