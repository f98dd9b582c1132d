"""What a record must name so that its figures mean something: versions, device, commit, threads."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import lowres

PACKAGES = ("lowres", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets",
            "deepspeed", "safetensors", "tokenizers", "numpy")  # fmt: skip


def versions() -> dict[str, str | None]:
    """Installed versions; None for what is not installed."""
    out: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = None
    # Run from a checkout that is not installed, the package still knows its version.
    out["lowres"] = lowres.__version__
    return out


def commit() -> dict[str, Any]:
    """The checkout this package runs from: commit, and whether any file of the package differs
    (untracked ones included).
    """
    home = Path(lowres.__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(home), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "--", str(home)):  # installed within a checkout of something else
        return {"commit": None, "dirty": None}
    status = git("status", "--porcelain", "--", str(home))
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(status) if status is not None else None,
    }


def describe(device: Any, processes: int) -> dict[str, Any]:
    """Everything about the place a run was made in."""
    import torch

    out: dict[str, Any] = {
        "versions": versions(),
        **commit(),
        "platform": platform.platform(),
        "executable": Path(sys.executable).name,
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "host_bytes": psutil.virtual_memory().total,
        "processes": processes,
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        out |= {
            "device_name": properties.name,
            "device_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "allocator": os.environ.get("PYTORCH_ALLOC_CONF")
            or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        }
    else:
        out |= {"device_name": processor(), "device_bytes": psutil.virtual_memory().total}
    return out


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
