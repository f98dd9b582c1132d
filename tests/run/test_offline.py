"""Nothing is fetched and nobody is told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

GUARD = """
import socket, sys
def refuse(self, address, *rest):
    raise AssertionError(f"a connection to {address} was tried")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda *a, **k: refuse(None, a)
import lowres
record = lowres.run(lowres.load_recipe(sys.argv[1]), output_folder=sys.argv[2], quiet=True)
assert record.outcome == "ok"
"""


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_a_run_over_local_files_opens_no_connection(
    method: str, raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Behaviour: with every socket refused and no offline variable set."""
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw_recipe("encoder", method=method)))
    environment = {k: v for k, v in os.environ.items() if not k.endswith("OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", GUARD, str(tmp_path / "r.yaml"), str(tmp_path / "out")],
        capture_output=True, text=True, env={**environment, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
