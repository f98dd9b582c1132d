"""Measure what a device's file can only assume: context, workspaces, rates, copies, dispatch.

The result lies in the user's cache folder, where `device.stored` finds it.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from lowres.core.errors import InputError
from lowres.core.paths import stop_if_unwritable, write_whole
from lowres.core.units import MIB
from lowres.memory.catalogue import Bytes, Device, Dtype, Rate
from lowres.memory.device import calibration_path, of_torch, versions
from lowres.memory.meter import process_bytes

SIZES = {"cuda": (1024, 2048, 4096), "mps": (512, 1024, 2048), "cpu": (256, 512, 1024)}
"""Sides of square products, by kind of device."""

COPY_BYTES = 256 * MIB
"""Several times any cache, and little beside the memory of any card."""

TOGETHER = {"cuda": 10, "mps": 10, "cpu": 1}  # Operations of a trial: waiting must hardly count.
TRIALS, TRIAL_SECONDS = 3, 0.5  # At least so many, over at least so long.


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class Figures:
    """The fields of a Device that were measured, under their names there; None: not measured.

    `rates` lacks a dtype that the device refuses, `pcie_bytes_per_second` is the slower direction.
    """

    rates: dict[Dtype, Rate]
    bandwidth_bytes_per_second: Rate
    launch_seconds: Rate
    context_bytes: Optional[Bytes] = None
    matmul_workspace_bytes: Optional[Bytes] = None
    pcie_bytes_per_second: Optional[Rate] = None


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class Calibration:
    """What was measured on one device.

    Args:
        date: ISO 8601, UTC.
        seconds: That measuring took.
        versions: That it holds for; see `device.versions`.
        matmul_handles: cuBLAS handles that a forward and a backward pass made; None off CUDA.
        to_device_bytes_per_second: Over the bus, pinned; None off CUDA, as is the way back.
    """

    name: str
    date: str
    seconds: float
    versions: dict[str, str]
    figures: Figures
    matmul_handles: Optional[int] = None
    to_device_bytes_per_second: Optional[Rate] = None
    to_host_bytes_per_second: Optional[Rate] = None


_ADAPTER = TypeAdapter(Calibration)


def to_dict(calibration: Calibration) -> dict[str, Any]:
    """JSON-ready, without what was not measured: `stored` keeps the file's figure there."""
    dumped: dict[str, Any] = _ADAPTER.dump_python(calibration, mode="json", exclude_none=True)
    return dumped


def calibrate(
    device: torch.device, sizes: Sequence[int] | None = None, copy_bytes: int = COPY_BYTES
) -> Calibration:
    """Measure a device and store the result; well under two minutes, on an idle machine.

    Nothing else may use the device meanwhile; the context is right in a fresh process only.

    Args:
        sizes: Sides of the square products; None for `SIZES`.
        copy_bytes: Of one copy.

    Raises:
        InputError: The cache folder cannot be written to.
    """
    start = time.perf_counter()
    handles = workspace = to_device = to_host = None
    context: int | None = 0  # off CUDA there is none
    fresh = device.type == "cuda" and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    here = of_torch(device)
    try:
        stop_if_unwritable(calibration_path(here), makes_folders=True)
    except InputError as error:
        text = f"{error.problems[0].text}; set LOWRES_CACHE to a folder that can"
        raise InputError(error.subject, [text]) from error
    if device.type == "cuda":
        before = _used_bytes(here) if fresh else None
        forward, backward = _workspaces(device)  # before anything else makes cuBLAS handles
        workspace, handles = forward, 1 + (backward > 0)
        context = _context(device, here, before)
        to_device, to_host = _bus(device, copy_bytes)
    figures = Figures(
        rates=_rates(device, here, sizes or SIZES[device.type]),
        bandwidth_bytes_per_second=_bandwidth(device, copy_bytes),
        launch_seconds=_launch(device),
        context_bytes=context,
        matmul_workspace_bytes=workspace,
        pcie_bytes_per_second=min(to_device, to_host) if to_device and to_host else None,
    )
    calibration = Calibration(
        name=here.name,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - start,
        versions=versions(),
        figures=figures,
        matmul_handles=handles,
        to_device_bytes_per_second=to_device,
        to_host_bytes_per_second=to_host,
    )
    _store(calibration, here)
    return calibration


def _store(calibration: Calibration, device: Device) -> None:
    path = calibration_path(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = _ADAPTER.dump_json(calibration, indent=1, exclude_none=True).decode()
        write_whole(path, text + "\n")
    except OSError as error:
        text = f"cannot be written: {error}; set LOWRES_CACHE to a folder that can"
        raise InputError(str(path), [text]) from error


def _seconds(device: torch.device, run: Callable[[], object], count: int | None = None) -> float:
    """Of one run: the median over trials of `count` runs. The first trial warms up."""
    count = count or TOGETHER[device.type]
    trials: list[float] = []
    end = time.perf_counter() + TRIAL_SECONDS
    while len(trials) <= TRIALS or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(count):
            run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        trials.append((time.perf_counter() - start) / count)
    return statistics.median(trials[1:])


def _rates(device: torch.device, here: Device, sizes: Sequence[int]) -> dict[Dtype, float]:
    """FLOP/s of square products by dtype, the median over sizes."""
    dtypes: list[Dtype] = ["float32", "float16"]
    if device.type != "cuda":
        dtypes += ["bfloat16"]
    elif (here.compute_capability or (0, 0)) >= (8, 0):  # Ampere
        dtypes += ["bfloat16", "tf32"]
    out: dict[Dtype, float] = {}
    precision = torch.get_float32_matmul_precision()
    try:
        for dtype in dtypes:
            torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
            real = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
            try:
                out[dtype] = statistics.median(_product_rate(device, real, n) for n in sizes)
            except (RuntimeError, TypeError):
                continue  # no kernel of that dtype, such as bfloat16 on an old macOS
    finally:
        torch.set_float32_matmul_precision(precision)
    return out


def _product_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    # Random, for on equal numbers a card draws less power and clocks higher than in training.
    seeded = torch.Generator(device).manual_seed(0)
    a = torch.randn(side, side, device=device, dtype=dtype, generator=seeded)
    b, out = a.t().clone(), torch.empty_like(a)
    return 2.0 * side**3 / _seconds(device, lambda: torch.mm(a, b, out=out))


def _bandwidth(device: torch.device, size_bytes: int) -> float:
    """Bytes read and written a second by copies within the device's memory."""
    source, target = (torch.zeros(size_bytes, dtype=torch.uint8, device=device) for _ in "ab")
    return 2 * size_bytes / _seconds(device, lambda: target.copy_(source))


def _bus(device: torch.device, size_bytes: int) -> tuple[float, float]:
    """Bytes a second to the device and back, from pinned memory."""
    host = torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=True)
    there = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    to_device = _seconds(device, lambda: there.copy_(host, non_blocking=True))
    to_host = _seconds(device, lambda: host.copy_(there, non_blocking=True))
    return size_bytes / to_device, size_bytes / to_host


def _launch(device: torch.device) -> float:
    """Seconds of one small operation: the device keeps up, the host is timed."""
    small = torch.zeros(16, device=device)
    return _seconds(device, lambda: small.add_(1), 1000)


def _workspaces(device: torch.device) -> tuple[int, int]:
    """Bytes that the first product leaves behind: in this thread, then in autograd's."""
    a = torch.ones(64, 64, device=device, requires_grad=True)
    bare = torch.cuda.memory_allocated(device)
    torch.mm(a.detach(), a.detach())
    forward = torch.cuda.memory_allocated(device) - bare
    torch.mm(a, a).sum().backward()  # type: ignore[no-untyped-call]
    a.grad = None
    return forward, torch.cuda.memory_allocated(device) - bare - forward


def _context(device: torch.device, here: Device, before: int | None) -> int | None:
    """Bytes beside the allocator's after one small training step; None where no one tells.

    A container hides the process's own figure; the card's then serves, less what it was before.
    """
    with torch.random.fork_rng(devices=[]):
        block = torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        model = torch.nn.Sequential(torch.nn.Embedding(64, 64), block, torch.nn.Linear(64, 64))
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(64, device=device).view(2, 32)
    with torch.autocast("cuda", torch.float16):
        logits = model(ids)
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    torch.cuda.synchronize(device)
    used, after = process_bytes(device), _used_bytes(here)
    if used is None and before is not None and after is not None:
        used = after - before
    return None if used is None else max(0, used - torch.cuda.memory_reserved(device))


def _used_bytes(device: Device) -> int | None:
    """Of the whole card by all processes (NVML)."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(device.uuid)
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    except pynvml.NVMLError:
        return None
