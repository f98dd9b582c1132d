"""Locks of builds that died.

torch builds what DeepSpeed needs at its first use, and locks the folder by a file that it keeps
open meanwhile. A run that is killed then leaves the file, and every later run waits for it without
an end and without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lowres.core.errors import LowresError

if TYPE_CHECKING:
    from psutil import Process


def stop_at_left_locks() -> None:
    """Raise LowresError where a lock is there that no process of this machine has open."""
    import psutil
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    if not locks:
        return
    held = {os.path.realpath(path) for one in psutil.process_iter() for path in _open(one)}
    left = [lock for lock in locks if os.path.realpath(lock) not in held]
    if left:
        raise LowresError(
            f"'{left[0]}' was left by a build that died, and DeepSpeed would wait for it without "
            "end; delete it, unless another machine builds there just now"
        )


def _open(process: Process) -> Iterator[str]:
    """Files that a process has open; none of one that is gone or somebody else's."""
    import psutil

    try:
        yield from (file.path for file in process.open_files())
    except (psutil.Error, OSError):
        return
