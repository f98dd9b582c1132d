"""Locks of builds that died.

torch builds what DeepSpeed needs at its first use, and locks the folder by a file that it keeps
open meanwhile. A run that is killed then leaves the file, and every later run waits for it without
an end and without a word.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lowres.core.errors import LowresError

if TYPE_CHECKING:
    from psutil import Process

GIVEN_BACK_SECONDS = 1.0


def stop_at_left_locks() -> None:
    """Raise LowresError where a lock is there that no process of this machine has open."""
    left = _left()
    if left:
        # A lock that is given back is closed before it is deleted, and may be another's next.
        time.sleep(GIVEN_BACK_SECONDS)
        left &= _left()
    if left:
        raise LowresError(
            f"'{min(left)[0]}' was left by a build that died, and DeepSpeed would wait for it "
            "without end; delete it, unless another machine builds there just now"
        )


def _left() -> set[tuple[str, int]]:
    """Locks that were there and that no process had open when it was asked, with their times."""
    import psutil
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks: set[tuple[str, int]] = set()
    for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        with contextlib.suppress(FileNotFoundError):
            locks.add((os.path.realpath(lock), lock.stat().st_mtime_ns))
    if not locks:
        return locks
    held = {os.path.realpath(path) for one in psutil.process_iter() for path in _open(one)}
    return {lock for lock in locks if lock[0] not in held}


def _open(process: Process) -> Iterator[str]:
    """Files that a process has open; none of one that is gone or somebody else's."""
    import psutil

    try:
        yield from (file.path for file in process.open_files())
    except (psutil.Error, OSError):
        return
