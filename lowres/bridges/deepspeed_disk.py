"""What DeepSpeed needs to keep states and parameters on a disk, and what it cannot do there."""

from __future__ import annotations

import ctypes.util
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from lowres.core.errors import InputError

_BUILDERS = {"ninja": "pip install ninja", "g++": "apt-get install g++"}
_LIBAIO = "apt-get install libaio-dev"


def stop_at_disk(plugin_: Any, folder: Path) -> None:
    """Raise InputError where weights or states lie on nvme: DeepSpeed 0.19 brings the states back
    and leaves the weights as they were loaded."""
    zero = plugin_.deepspeed_config["zero_optimization"]
    places = [zero.get(key, {}).get("device") for key in ("offload_optimizer", "offload_param")]
    if "nvme" in places:
        text = "DeepSpeed cannot resume from it what lies on nvme; begin anew, or offload to cpu"
        raise InputError(f"'{folder}'", [text])


def nvme_problem() -> str | None:
    """Why states cannot be kept on a disk here, with the commands that mend it; None when they
    can."""
    lacking = {tool: how for tool, how in _BUILDERS.items() if shutil.which(tool) is None}
    if lacking:
        tools, how = " and ".join(lacking), "; ".join(lacking.values())
        return f"DeepSpeed builds its asynchronous reader with {tools}, not found here: {how}"
    if ctypes.util.find_library("aio") is None:
        return f"the library libaio is not there: {_LIBAIO}"
    if not _has_header("libaio.h"):
        return (
            "libaio is there without its header libaio.h, which DeepSpeed's asynchronous reader is "
            f"built with: {_LIBAIO}"
        )
    return None


def _has_header(name: str) -> bool:
    """Whether the compiler finds it, wherever it looks."""
    flags = shlex.split(os.environ.get("CFLAGS", ""))
    command = ["g++", *flags, "-E", "-x", "c++", "-include", name, os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0
