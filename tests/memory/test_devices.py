"""The cards to plan for, and measuring the one at hand."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lowres.core.errors import InputError
from lowres.core.units import GIB, MIB
from lowres.memory import calibrate as calibrating
from lowres.memory import device as devices
from lowres.planning.plan import plan

NO_FIGURES = {"name", "kind", "sources", "uuid", "calibrated", "ignored"}
CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and trials as short as they can be."""
    monkeypatch.setenv("LOWRES_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrating, "TRIAL_SECONDS", 0.0)
    return tmp_path


def small_calibration() -> calibrating.Calibration:
    return calibrating.calibrate(CPU, sizes=(16, 24), copy_bytes=64 * 1024)


def test_a_calibration_lies_in_the_cache_folder(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: `LOWRES_CACHE`, as of all caches, else in the user's."""
    path = devices.calibration_path(devices.load("cpu"))
    assert path.parent == cache
    monkeypatch.delenv("LOWRES_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "users"))
    path = devices.calibration_path(devices.load("cpu"))
    assert path.parent == cache / "users" / "lowres"


def test_there_are_enough_cards() -> None:
    """Behaviour: the tests below run over something."""
    assert len(devices.names()) >= 28
    kinds = [devices.load(name).kind for name in devices.names()]
    assert {k: kinds.count(k) for k in set(kinds)} == {"cuda": len(kinds) - 3, "mps": 2, "cpu": 1}


@pytest.mark.parametrize("name", devices.names())
def test_each_file_is_valid_and_each_figure_has_a_source(name: str) -> None:
    """Behaviour: types by the dataclass; sources for exactly the figures that are there."""
    device = devices.load(name)
    figures = {
        f.name
        for f in dataclasses.fields(device)
        if f.name not in NO_FIGURES and getattr(device, f.name) is not None
    }
    assert set(device.sources) == figures
    assert all(len(text) > 5 for text in device.sources.values())
    card = devices.card(device)
    assert 0 < card.available_bytes < card.total_bytes == device.total_bytes
    assert device.rates is not None and device.rates["float32"] > 0
    if device.kind == "cuda":
        assert device.sms is not None and device.compute_capability is not None
        # The formula that the source line states; a file may not drift from it.
        assert device.context_bytes == devices.context_bytes(device.sms)
        assert ("bfloat16" in device.rates) == (device.compute_capability >= (8, 0))
        assert ("tf32" in device.rates) == ("bfloat16" in device.rates)


@pytest.mark.parametrize(
    "word, name",
    [
        ("rtx-4090", "NVIDIA GeForce RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("rtx4090", "NVIDIA GeForce RTX 4090"),
        (" 4090 ", "NVIDIA GeForce RTX 4090"),
        ("RTX 4060 Mobile", "NVIDIA GeForce RTX 4060 Laptop GPU"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", "NVIDIA GeForce RTX 4060 Laptop GPU"),
        ("4060 Ti", "NVIDIA GeForce RTX 4060 Ti 16GB"),
        ("1080ti", "NVIDIA GeForce GTX 1080 Ti"),
        ("Tesla T4", "NVIDIA T4"),
        ("a100 80 GiB", "NVIDIA A100-SXM4-80GB"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"),
        ("m3 max", "Apple M3 Max 64GB"),
    ],
)
def test_a_card_is_found_by_what_people_call_it(word: str, name: str) -> None:
    """Behaviour."""
    assert devices.load(word).name == name


def test_each_card_is_found_by_its_file_and_by_its_own_name() -> None:
    """Behaviour: no name of one card leads to another."""
    for file in devices.names():
        assert devices.load(devices.load(file).name) == devices.load(file)


@pytest.mark.parametrize(
    "word, part",
    [
        ("rtx-4091", "no card is named 'rtx-4091'; did you mean 'rtx-4090'?"),
        ("4070 super", "did you mean 'rtx-4070-ti-super'?"),
        ("NVIDIA H100 PCIe", "there are a10, a100-40gb"),
        ("", "no card is named ''"),
        ("a100", "'a100' may be a100-40gb or a100-80gb; give one of them"),
    ],
)
def test_an_unknown_card_gets_a_suggestion(word: str, part: str) -> None:
    """Behaviour: also that a card with other units is not taken for the one of a file."""
    with pytest.raises(InputError) as caught:
        devices.load(word)
    assert part in str(caught.value)
    assert str(caught.value).startswith("--gpu has 1 problem")
    assert ("--device-gib N" in str(caught.value)) == ("may be" not in str(caught.value))


def test_a_budget_lowers_what_is_available_and_never_raises_it() -> None:
    """Closed form: the smaller of the budget and of what the system leaves, less the context."""
    device = devices.load("rtx-4090")
    assert devices.card(device, 8).available_bytes == 8 * GIB - device.context_bytes
    left = device.total_bytes - device.reserved_by_system_bytes - device.context_bytes
    assert devices.card(device, device.total_bytes / GIB - 0.001).available_bytes == left
    assert devices.card(device, 80) == devices.card(device)
    plain = devices.generic(8)
    card = devices.card(plain)
    assert (card.name, card.total_bytes) == ("8 GiB card", 8 * GIB)
    assert card.available_bytes == 8 * GIB - devices.context_bytes(devices.GENERIC_SMS)
    assert plain.rates is None and plain.launch_seconds is None


@pytest.mark.parametrize("device_gib", [0.4, 0, -1, float("nan"), float("inf")])
def test_a_budget_below_the_context_is_refused(device_gib: float) -> None:
    """Behaviour: value, reason and what to do."""
    with pytest.raises(InputError) as caught:
        devices.card(devices.load("rtx-4090"), device_gib)
    text = str(caught.value)
    assert f"`budget.device_gib`: {device_gib:g} " in text
    if device_gib == 0.4:
        assert "the context takes 501.2 MiB" in text and "give more than 0.49 GiB" in text


def test_workspaces_by_architecture() -> None:
    """Closed form: torch's rule, 2 x 4096 KiB + 8 x 16 KiB before Hopper."""
    assert devices.workspace_bytes((7, 5)) == devices.workspace_bytes((8, 9))
    assert devices.workspace_bytes((8, 9)) == (2 * 4096 + 8 * 16) * 1024
    assert devices.workspace_bytes((9, 0)) == devices.workspace_bytes((12, 0)) == 32 * MIB


def nvml(
    name: str, total_mib: int, capability: tuple[int, int], cores: int, used_mib: int = 3
) -> Any:
    """A driver's library that knows one card."""

    class Failure(Exception):
        pass

    def by_uuid(uuid: str) -> str:
        if uuid != "GPU-1":
            raise Failure
        return uuid

    memory = SimpleNamespace(total=(total_mib + 400) * MIB, reserved=400 * MIB, used=used_mib * MIB)
    there = [SimpleNamespace(pid=-1, usedGpuMemory=None)]
    return SimpleNamespace(
        NVMLError=Failure, nvmlMemory_v2=2, nvmlInit=lambda: None, nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: "GPU-1", nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetCudaComputeCapability=lambda handle: list(capability),
        nvmlDeviceGetMemoryInfo=lambda handle, version: memory,
        nvmlDeviceGetNumGpuCores=lambda handle: cores, nvmlDeviceGetName=lambda handle: name,
        nvmlDeviceGetUUID=lambda handle: "GPU-1",
        nvmlDeviceGetComputeRunningProcesses=lambda handle: there,
    )  # fmt: skip


def test_the_card_of_this_machine_has_its_real_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: the file of its name, or a generic card where none fits; none without a card."""
    here: Callable[..., None] = lambda *a: monkeypatch.setitem(sys.modules, "pynvml", nvml(*a))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    here("NVIDIA GeForce RTX 4090", 24217, (8, 9), 16384)
    card = devices.present()
    assert card is not None and card.rates == devices.load("rtx-4090").rates
    assert (card.total_bytes, card.uuid) == (24217 * MIB, "GPU-1")
    # One name, two cards: the one with 6 GB has fewer SMs.
    here("NVIDIA GeForce RTX 3050", 5803, (8, 6), 2304)
    card = devices.present()
    assert card is not None and card.rates is None
    assert (card.name, card.sms, card.total_bytes) == ("NVIDIA GeForce RTX 3050", 18, 5803 * MIB)
    for visible, found in (("GPU-1", True), ("0,1", True), ("", False), ("-1", False)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert (devices.present() is not None) == found, visible


def test_what_others_hold_of_the_card_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: a desktop and another program hold 1.5 GiB; a file's larger figure stays."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    offered = []
    for used in (3, 1536):
        driver = nvml("NVIDIA GeForce RTX 3050", 5803, (8, 6), 2304, used)
        monkeypatch.setitem(sys.modules, "pynvml", driver)
        card = devices.present()
        assert card is not None
        assert devices.card(card).offered_bytes == 5803 * MIB
        offered.append(devices.card(devices.beside_others(card)).offered_bytes)
    assert offered == [5800 * MIB, (5803 - 1536) * MIB]
    own = devices.load("rtx-4090").reserved_by_system_bytes
    driver = nvml("NVIDIA GeForce RTX 4090", 24217, (8, 9), 16384, own // MIB - 1)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    card = devices.present()
    assert card is not None and devices.beside_others(card) == card
    assert devices.beside_others(devices.load("rtx-4090")).reserved_by_system_bytes == own


def test_a_calibration_is_stored_and_stands_in_for_the_file(cache: Path) -> None:
    """Behaviour, on the CPU: figures measured here, and only those, replace the file's."""
    plain = devices.load("cpu")
    assert devices.stored(plain) == plain
    measured = small_calibration()
    assert measured.matmul_handles is None and measured.to_host_bytes_per_second is None
    path = devices.calibration_path(plain)
    assert [path] == list(cache.rglob("*.*")), "one file, nothing left aside"
    device = devices.stored(plain)
    assert device.calibrated and not plain.calibrated and not device.ignored
    assert device.rates == measured.figures.rates and set(device.rates or ()) >= {"float32"}
    assert device.launch_seconds == measured.figures.launch_seconds
    assert 1e-8 < measured.figures.launch_seconds < 1e-2
    assert device.context_bytes == 0 and device.total_bytes == plain.total_bytes
    assert device.sources["rates"] == f"calibration of {measured.date}"
    assert device.sources["total_bytes"] == plain.sources["total_bytes"]


def test_a_calibration_under_other_versions_is_ignored_and_said_so(
    cache: Path, recipe: Callable[..., Any]
) -> None:
    """Behaviour: also one that is broken, or that holds a figure no device has; a plan says so."""
    small_calibration()
    plain = devices.load("cpu")
    path = devices.calibration_path(plain)
    right = json.loads(path.read_text())
    path.write_text(json.dumps(right | {"versions": right["versions"] | {"torch": "1.0"}}))
    device = devices.stored(plain)
    assert "torch was 1.0, is " in device.ignored
    assert dataclasses.replace(device, ignored="") == plain
    told = plan(recipe(), plain).notes
    assert told == [device.ignored]
    for broken in ("", "[]", "{}", json.dumps(right | {"figures": {"rates": {"int3": 1.0}}}),
                   json.dumps(right | {"figures": {"colour": 1}}),
                   json.dumps(right | {"versions": {}})):  # fmt: skip
        path.write_text(broken)
        device = devices.stored(plain)
        assert "is no calibration" in device.ignored, broken
        assert dataclasses.replace(device, ignored="") == plain


def test_a_cache_folder_that_cannot_be_written_is_an_error_in_words(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour."""
    (cache / "file").touch()
    monkeypatch.setenv("LOWRES_CACHE", str(cache / "file"))
    with pytest.raises(InputError, match="set LOWRES_CACHE"):
        small_calibration()


def test_the_doctor_prints_what_it_measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: as a table and as JSON, with the place where it lies."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("measures the accelerator, with its large sizes")
    from lowres.cli.doctor import app

    monkeypatch.setitem(calibrating.SIZES, "cpu", (16,))
    path = str(devices.calibration_path(devices.load("cpu")))
    done = CliRunner().invoke(app, ["--calibrate"])
    assert done.exit_code == 0 and "TFLOP/s" in done.stdout and path in done.stdout
    done = CliRunner().invoke(app, ["--calibrate", "--json"])
    found = json.loads(done.stdout)
    assert (
        found["path"] == path and found["figures"] == json.loads(Path(path).read_text())["figures"]
    )
