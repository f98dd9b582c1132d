"""The device planned for: a card by its name, by its size alone, or the one of this machine.

`lowres doctor --calibrate` measures the one at hand. Nothing here opens a CUDA context.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from lowres.core.errors import InputError, Problem
from lowres.core.paths import cache_folder
from lowres.core.plan import Card
from lowres.core.units import GIB, MIB, format_bytes, gib_to_bytes
from lowres.memory.catalogue import Device, load, names

if TYPE_CHECKING:
    import torch

__all__ = ["Device", "load", "names"]  # the catalogue's, offered here too

GENERIC_SMS = 30  # between an RTX 3060 and a 4060 Ti
LIKE_ITS_FILE = 0.1  # share of memory: an RTX 3050 has 8 GB, or 6 and fewer SMs


def context_bytes(sms: int) -> int:
    """Of a CUDA context after a training step with lazy loading, by the number of SMs.

    The affine part is a fit to four public reports of bare contexts (RTX 4060 Ti 107 MiB, 3090
    256, RTX 6000 Ada 426, RTX PRO 6000 Blackwell 555); 120 MiB of kernels are an assumption.
    """
    return round((10 + 2.9 * sms + 120) * MIB)


def workspace_bytes(compute_capability: tuple[int, int]) -> int:
    """Of one cuBLAS handle, by torch's rule: 2 x 4096 + 8 x 16 KiB before Hopper, then 32 MiB.

    Source: `CUDABlas` of torch and its issue 95668. On Blackwell (10.x, 12.x) not confirmed.
    """
    return 8_519_680 if compute_capability < (9, 0) else 32 * MIB


def generic(device_gib: float) -> Device:
    """An Ampere card of that many GiB, all of them for lowres; nothing is known of its speed.

    Raises InputError where that is no size.
    """
    return _generic(f"{device_gib:g} GiB card", _size(device_gib), (8, 6), GENERIC_SMS)


def _generic(name: str, total_bytes: int, capability: tuple[int, int], sms: int) -> Device:
    assumed = ("reserved_by_system_bytes", "context_bytes", "context_band_bytes")
    given = ("total_bytes", "compute_capability", "sms")
    return Device(
        name=name, kind="cuda", total_bytes=total_bytes, reserved_by_system_bytes=0,
        context_bytes=context_bytes(sms), context_band_bytes=150 * MIB,
        compute_capability=capability, sms=sms,
        sources=dict.fromkeys(given, "given") | dict.fromkeys(assumed, f"assumption for {sms} SMs"),
    )  # fmt: skip


def slowest_of_size(total_bytes: int) -> Device | None:
    """The CUDA card of the catalogue with about that much memory and the least bandwidth."""
    found = [d for d in map(load, names()) if d.kind == "cuda" and d.rates
             and abs(d.total_bytes - total_bytes) <= LIKE_ITS_FILE * total_bytes]  # fmt: skip
    return min(found, key=lambda d: d.bandwidth_bytes_per_second or math.inf, default=None)


def card(device: Device, device_gib: float | None = None) -> Card:
    """The device as a plan sees it, with no more than a budget of GiB.

    Raises InputError where nothing is left for tensors, or the budget is no size.
    """
    total = device.total_bytes if device_gib is None else min(device.total_bytes, _size(device_gib))
    # What the system keeps comes out of what a budget below the whole card leaves anyway.
    offered = min(total, device.total_bytes - device.reserved_by_system_bytes)
    if offered <= device.context_bytes:
        shown = format_bytes(total) if device_gib is None else f"{device_gib:g} GiB"
        kept = device.context_bytes + (offered < total) * device.reserved_by_system_bytes
        text = (
            f"{shown} leaves nothing for tensors: on {device.name} the context takes "
            f"{format_bytes(device.context_bytes)} and the system or others keep "
            f"{format_bytes(device.reserved_by_system_bytes)}; give more than {kept / GIB:.2f} GiB"
        )
        raise InputError("the budget", [Problem("budget.device_gib", text)])
    available = offered - device.context_bytes
    return Card(device.name, device.kind, total, device.context_bytes, available)


def _size(device_gib: float) -> int:
    if not (math.isfinite(device_gib) and device_gib > 0):
        text = f"{device_gib:g} is no size of a card; give GiB, such as 8"
        raise InputError("the budget", [Problem("budget.device_gib", text)])
    return gib_to_bytes(device_gib)


def present() -> Device | None:
    """The accelerator of this machine with its real memory: its file, or else a generic one.

    None where there is neither a CUDA device nor Apple's GPU. torch is asked only where it has
    opened CUDA already, otherwise the driver's own library (NVML).
    """
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return _apple()
    loaded = sys.modules.get("torch")
    if loaded is not None and loaded.cuda.is_initialized():
        return of_torch(loaded.device("cuda", loaded.cuda.current_device()))
    return _from_nvml()


def of_torch(device: torch.device) -> Device:
    """The device that torch means; on CUDA torch starts its runtime for it."""
    if device.type != "cuda":
        return _apple() if device.type == "mps" else load("cpu")
    import torch

    p = torch.cuda.get_device_properties(device)
    sms, uuid = p.multi_processor_count, f"GPU-{p.uuid}"
    return _real(p.name, p.total_memory, (p.major, p.minor), sms, uuid)


def _real(name: str, total: int, capability: tuple[int, int], sms: int, uuid: str) -> Device:
    try:
        device = load(name)
        like = abs(device.total_bytes - total) <= LIKE_ITS_FILE * total
    except InputError:
        like = False
    if not like:
        device = _generic(name, total, capability, sms)
    sources = {**device.sources, "total_bytes": "this machine"}
    return dataclasses.replace(device, total_bytes=total, uuid=uuid, sources=sources)


def beside_others(device: Device) -> Device:
    """The card of this machine without what the system and other programs hold of it now, where the
    driver tells and that is more than its file says."""
    if device.kind != "cuda" or device.uuid is None:
        return device
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(device.uuid)
        held = pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2).used
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except (pynvml.NVMLError, AttributeError):
        return device
    own = [p.usedGpuMemory for p in processes if p.pid == os.getpid()]
    loaded = sys.modules.get("torch")
    unknown = not own and loaded is not None and loaded.cuda.is_initialized()
    if unknown or None in own:
        return device  # Containers and Windows hide what this process holds of it.
    held -= sum(own)
    if held <= device.reserved_by_system_bytes:
        return device
    sources = {**device.sources, "reserved_by_system_bytes": "this machine, held by others now"}
    return dataclasses.replace(device, reserved_by_system_bytes=held, sources=sources)


def _from_nvml() -> Device | None:
    """The first card that CUDA may see; NVML counts by slot, CUDA by speed, so an index may err."""
    import pynvml

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
    try:
        pynvml.nvmlInit()
        try:
            by_index = pynvml.nvmlDeviceGetHandleByIndex
            by_uuid = pynvml.nvmlDeviceGetHandleByUUID
            handle = by_index(int(visible)) if visible.isdigit() else by_uuid(visible)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2)
            cores = pynvml.nvmlDeviceGetNumGpuCores(handle)
            name, uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    # CUDA programming guide, arithmetic throughput: float32 lanes of one SM.
    sms = cores // (64 if (major, minor) in ((6, 0), (7, 0), (7, 5), (8, 0)) else 128)
    # What the driver keeps for itself, torch's `total_memory` leaves out.
    return _real(name, memory.total - memory.reserved, (major, minor), sms, uuid)


def _apple() -> Device:
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    chip = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    total = psutil.virtual_memory().total
    try:
        return load(f"{chip} {round(total / GIB)}gb")
    except InputError:
        assumed = ("reserved_by_system_bytes", "context_bytes", "context_band_bytes")
        return Device(
            name=chip, kind="mps", total_bytes=total, reserved_by_system_bytes=total // 4,
            context_bytes=0, context_band_bytes=150 * MIB,
            sources={"total_bytes": "this machine"} | dict.fromkeys(assumed, "assumption for Macs"),
        )  # fmt: skip


def versions() -> dict[str, str]:
    """What a calibration holds for: torch, the driver, the processor that dispatches."""
    import pynvml

    driver = platform.mac_ver()[0] or "none"
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        pynvml.nvmlShutdown()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    processor = f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"
    return {"torch": metadata.version("torch"), "driver": driver, "processor": processor}


def calibration_path(device: Device) -> Path:
    """Of a device, by UUID or else name, in the cache folder."""
    key = re.sub(r"[^a-z0-9]+", "-", (device.uuid or device.name).lower())
    return cache_folder() / f"calibration-{key}.json"


def stored(device: Device) -> Device:
    """The device with the figures that were measured on it, where there are some.

    A calibration that is broken, or of other versions, is left out; `ignored` says why.
    """
    path = calibration_path(device)
    if not path.exists():
        return device
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        then, figures, date = found["versions"], found["figures"], found["date"]
        sources = {**device.sources, **dict.fromkeys(figures, f"calibration of {date}")}
        measured = dataclasses.replace(device, **figures, sources=sources, calibrated=True)
        changed = [f"{k} was {then[k]}, is {v}" for k, v in versions().items() if then[k] != v]
    except (OSError, ValueError, KeyError, TypeError):
        changed = [f"{path} is no calibration"]
    if changed:
        mend = "`lowres doctor --calibrate` measures it anew"
        why = f"the device's calibration is ignored: {'; '.join(changed)}; {mend}"
        return dataclasses.replace(device, ignored=why)
    return measured
