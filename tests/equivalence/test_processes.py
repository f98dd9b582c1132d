"""Two processes under `accelerate launch` against one, with the same global batch."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import lowres


def test_two_processes_give_the_losses_of_one(
    raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Reference: the same recipe in one process; gradients differ by the rounding of their sum."""
    keys = raw_recipe("encoder", method="lora", loop={"steps": 5, "micro_batch_size": 2})
    one = lowres.run(
        lowres.load_recipe(keys), output_folder=tmp_path / "one", quiet=True, plan=False
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(keys))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
         "--num_machines", "1", "--main_process_port", str(port), "--mixed_precision", "no",
         "--dynamo_backend", "no", "-m",
         "lowres", "run", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "two")],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert (tmp_path / "two" / "record.json").exists(), done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "record.json").read_text())
    assert two["outcome"] == "ok"
    assert two["environment"]["processes"] == 2
    assert two["losses"] == pytest.approx(one.losses, rel=1e-5)
    logs = [(tmp_path / n / "losses.jsonl").read_text().splitlines() for n in ("one", "two")]
    norms = [[json.loads(line)["grad_norm"] for line in log] for log in logs]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4) and len(norms[0]) == 5
    assert [s["n"] for s in two["scores"]] == [s.n for s in one.scores]
    assert [s["value"] for s in two["scores"]] == pytest.approx(
        [s.value for s in one.scores], rel=1e-5
    )
