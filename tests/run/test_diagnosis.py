"""What `lowres doctor` finds. All tests check behaviour, on machines that are partly made up."""

from __future__ import annotations

import json
import socket
import sys
import types
from importlib import metadata

import pytest
from typer.testing import CliRunner

from lowres.cli.doctor import app
from lowres.run import diagnosis
from lowres.run.diagnosis import Check


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def named(checks: list[Check], name: str) -> Check:
    (found,) = [c for c in checks if c.name == name]
    return found


def version_of(name: str, version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one package seem to have another version, or none."""
    real = metadata.version

    def seen(asked: str) -> str:
        if asked != name:
            return real(asked)
        if version is None:
            raise metadata.PackageNotFoundError(asked)
        return version

    monkeypatch.setattr(metadata, "version", seen)


def test_doctor_json_parses_and_names_torch_ok_without_a_socket() -> None:
    """Behaviour: with HF_HUB_OFFLINE nothing connects, and the hub's line says so."""
    done = CliRunner().invoke(app, ["--json"])
    assert done.exit_code == 0, done.output
    checks = {c["name"]: c for c in json.loads(done.output)}
    assert checks["torch"]["status"] == "ok"
    assert checks["hub"] == {
        "name": "hub", "status": "ok", "found": "not asked: HF_HUB_OFFLINE set", "mend": None,
    }  # fmt: skip
    assert {
        "python",
        "torch build",
        "host memory",
        "disk here",
        "data folder",
        "embedded model",
    } < set(checks)


def test_whatever_is_not_ok_comes_with_what_mends_it() -> None:
    """Behaviour: on this machine, whatever it has; and nothing that is ok asks for anything."""
    checks = diagnosis.diagnose()
    assert len(checks) > 15
    assert all((c.status == "ok") == (c.mend is None) for c in checks)


@pytest.mark.parametrize("version", [None, "0.1.0", "99.0"])
def test_a_required_package_that_is_missing_or_out_of_range_ends_with_1(
    version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: the line below it is the pip command with the range."""
    version_of("peft", version, monkeypatch)
    check = named(diagnosis.diagnose(), "peft")
    assert check.status == "missing"
    assert check.mend is not None and check.mend.startswith("pip install 'peft")
    assert "<0.22" in check.mend and ">=0.21" in check.mend
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 1
    assert f"-> {check.mend}" in done.output
    assert "1 missing" in done.output


def test_a_local_build_label_does_not_put_a_version_out_of_range(monkeypatch) -> None:
    """Behaviour: 2.6.0+cu124 is 2.6.0 to a range."""
    version_of("torch", "2.6.0+cu124", monkeypatch)
    assert named(list(diagnosis._packages()), "torch").status == "ok"


def test_requirements_of_another_platform_or_an_extra_are_not_asked_for(monkeypatch) -> None:
    """Behaviour: markers decide; a Mac has no DeepSpeed to miss."""
    lines = ["a>=1", 'b>=1; sys_platform == "nowhere"', 'c>=1; extra == "test"']
    monkeypatch.setattr(metadata, "requires", lambda _: lines)
    monkeypatch.setattr(metadata, "metadata", lambda _: {"Requires-Python": ">=3.10"})
    python, found = diagnosis.own_requirements()
    assert python == ">=3.10"
    assert [r.name for r in found] == ["a"]


def test_an_unreachable_hub_is_a_warning(monkeypatch) -> None:
    """Behaviour: the whole run can be done from local folders, so it is no fault."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")

    def fail(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(diagnosis.urllib.request, "urlopen", fail)
    check = diagnosis._hub()
    assert check.status == "warning"
    assert check.found == "http://localhost:9 cannot be reached: no route"
    assert check.mend is not None and "hf download" in check.mend


@pytest.mark.parametrize(
    "capability, status", [((9, 0), "ok"), ((8, 0), "ok"), ((7, 5), "warning")]
)
def test_a_card_is_described_by_its_driver_without_a_context(
    capability, status, monkeypatch
) -> None:
    """Behaviour: sizes, capability, whether bfloat16 is native; torch.cuda is not asked."""
    gib = 2**30
    driver = types.SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetName=lambda h: "Card",
        nvmlDeviceGetMemoryInfo=lambda h: types.SimpleNamespace(total=8 * gib, free=7 * gib),
        nvmlDeviceGetCudaComputeCapability=lambda h: capability,
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    (card,) = diagnosis._cards()
    assert card.name == "CUDA device 0"
    assert card.status == status
    assert card.found.startswith("Card, 8.00 GiB total, 7.00 GiB free, capability ")
