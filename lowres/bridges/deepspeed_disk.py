"""What DeepSpeed needs to keep states and parameters on a disk, and what it cannot do there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lowres.core.errors import InputError


def stop_at_disk(plugin_: Any, folder: Path) -> None:
    """Raise InputError where weights or states lie on nvme: DeepSpeed 0.19 brings the states back
    and leaves the weights as they were loaded."""
    zero = plugin_.deepspeed_config["zero_optimization"]
    places = [zero.get(key, {}).get("device") for key in ("offload_optimizer", "offload_param")]
    if "nvme" in places:
        text = "DeepSpeed cannot resume from it what lies on nvme; begin anew, or offload to cpu"
        raise InputError(f"'{folder}'", [text])


def nvme_problem() -> str | None:
    """Why states cannot be kept on a disk here; None when they can."""
    if shutil.which("ninja") is None or shutil.which("g++") is None:
        return "DeepSpeed builds its asynchronous reader with ninja and g++; install both"
    import ctypes.util

    if ctypes.util.find_library("aio") is None:
        return "libaio is not there; apt-get install libaio-dev"
    return None
