"""The peaks of each phase: live tensors, the CUDA allocator's and the driver's figures,
resident memory.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import torch

from lowres.core.record import Phase, PhaseMemory
from lowres.memory.live import LiveBytes

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class Meter:
    """Measures phases of one run in one process.

    Args:
        device: Where tensors live.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phases: dict[Phase, PhaseMemory] = {}
        self.start()
        if device.type == "cuda":
            self._retries_before = _allocator_retries(device)

    def start(self) -> None:
        """Resident memory counts from here."""
        self._resident_before = _resident_bytes()

    @contextlib.contextmanager
    def phase(
        self, name: Phase, held: Callable[[], Iterable[torch.Tensor]] | None = None
    ) -> Iterator[None]:
        """Measure a block as (part of) a phase; a phase entered again keeps the larger peaks.

        Args:
            held: On CPU, the tensors alive at the start; live bytes are counted in this block,
                which slows it (a probe). None leaves them out.
        """
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        reset = _reset_peak_resident()
        counting = LiveBytes("cpu", held()) if held is not None and not cuda else None
        start = time.perf_counter()
        try:
            with counting or contextlib.nullcontext():
                yield
            if cuda:
                torch.cuda.synchronize(self.device)
        finally:
            seconds = time.perf_counter() - start
            memory = PhaseMemory(
                resident_bytes=max(0, _peak_resident_bytes(reset) - self._resident_before),
                seconds=seconds,
            )
            if counting is not None:
                memory.live_bytes = counting.peak_bytes
            if cuda:
                stats = torch.cuda.memory_stats(self.device)
                memory.live_bytes = stats.get("requested_bytes.all.peak")
                memory.allocated_bytes = torch.cuda.max_memory_allocated(self.device)
                memory.reserved_bytes = torch.cuda.max_memory_reserved(self.device)
                memory.process_bytes = process_bytes(self.device)
            self._keep(name, memory)

    def _keep(self, name: Phase, new: PhaseMemory) -> None:
        old = self.phases.get(name)
        if old is None:
            self.phases[name] = new
            return
        for key in ("live_bytes", "allocated_bytes", "reserved_bytes", "process_bytes",
                    "resident_bytes"):  # fmt: skip
            values = [v for v in (getattr(old, key), getattr(new, key)) if v is not None]
            setattr(old, key, max(values, default=None))
        old.seconds = (old.seconds or 0.0) + (new.seconds or 0.0)

    def allocator_retries(self) -> int | None:
        """How often the CUDA allocator had to free its cache and try again since the run began."""
        if self.device.type != "cuda":
            return None
        return _allocator_retries(self.device) - self._retries_before


def _allocator_retries(device: torch.device) -> int:
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))


def process_bytes(device: torch.device) -> int | None:
    """What the driver charges this process on a CUDA device (NVML); None where it does not say."""
    import os

    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        there = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        # In a container the driver may tell the number that a process has outside.
        own = [p for p in there if p.pid == os.getpid()] or (there if len(there) == 1 else [])
        if own and own[0].usedGpuMemory is not None:
            return int(own[0].usedGpuMemory)
    except (pynvml.NVMLError, AttributeError):
        return None  # containers and Windows hide per-process figures
    return None


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def _reset_peak_resident() -> bool:
    """Start the kernel's high-water mark anew (Linux); False where that cannot be done."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _peak_resident_bytes(was_reset: bool) -> int:
    """High-water mark since the reset; where there is none,
    the larger of now and the process's peak.
    """
    if was_reset:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", info.rss))
