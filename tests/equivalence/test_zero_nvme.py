"""DeepSpeed's ZeRO with states and parameters on a disk against runs without, and against its plan.

DeepSpeed compiles its reader at the first of them, which takes minutes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import lowres
from lowres.bridges import deepspeed_disk
from lowres.core.errors import InputError
from tests.equivalence.test_zero import TOLERANCE, compare, launched

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        deepspeed_disk.nvme_problem() is not None, reason=f"nvme: {deepspeed_disk.nvme_problem()}"
    ),
]
ZERO3 = {"name": "zero", "stage": 3, "offload_parameters": "cpu", "whole_elements": 0}
STATES = ZERO3 | {"offload_optimizer": "nvme", "bucket_elements": 2_000}
BOTH = STATES | {"offload_parameters": "nvme"}
BF16 = {"precision": "bf16"}


@pytest.fixture
def keys(raw_recipe: Callable[..., dict[str, Any]], wide: Path) -> Callable[..., dict[str, Any]]:
    """A recipe over weights that are large enough for the disk."""

    def make(method: str, loop: dict[str, Any], lever: dict[str, Any] | None) -> dict[str, Any]:
        loop = {"steps": 2, "micro_batch_size": 2, "max_grad_norm": None} | loop
        levers = [] if lever is None else [lever]
        model = {"checkpoint": str(wide)}
        return raw_recipe(
            objective="label_words", method=method, loop=loop, levers=levers, model=model
        )

    return make


def _recorded(keys: dict[str, Any], folder: Path, processes: int = 0) -> dict[str, Any]:
    """The record of a run in processes of its own, which writes to a disk beside it."""
    folder.mkdir()
    for lever in keys["levers"]:
        if "config" in lever:
            for place in ("offload_optimizer", "offload_param"):
                lever["config"]["zero_optimization"][place]["nvme_path"] = str(folder / "disk")
            (folder / "ds.json").write_text(json.dumps(lever["config"]))
            lever["config"] = str(folder / "ds.json")
        elif "nvme" in lever.values():
            lever["nvme_path"] = str(folder / "disk")
    (folder / "r.yaml").write_text(yaml.safe_dump(keys))
    said = launched(folder / "r.yaml", processes, 3, "--output", str(folder / "run"))
    assert (folder / "run" / "record.json").exists(), said
    record: dict[str, Any] = json.loads((folder / "run" / "record.json").read_text())
    assert record["outcome"] == "ok", record["error"]
    return record


def _over_memory() -> dict[str, Any]:
    """More parameters are trained than stay in memory; several sub-groups, small gradients."""
    nvme = {"device": "nvme", "pin_memory": False}
    zero = {
        "stage": 3, "reduce_bucket_size": 2_000, "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 100,
        "sub_group_size": 1_000_000, "offload_optimizer": dict(nvme),
        "offload_param": nvme | {
            "buffer_size": 530_000, "buffer_count": 20, "max_in_cpu": 2_000_000},
    }  # fmt: skip
    return {"name": "zero", "config": {"zero_optimization": zero}}


PLANNED = [
    pytest.param(STATES, "full", {}, 0),
    pytest.param(STATES, "full", {}, 2),
    pytest.param(BOTH, "lora", BF16, 0),
    pytest.param(_over_memory(), "full", BF16, 0),
]


@pytest.mark.parametrize(("lever", "method", "loop", "processes"), PLANNED)
def test_the_plan_is_what_is_measured(
    lever: dict[str, Any],
    method: str,
    loop: dict[str, Any],
    processes: int,
    keys: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Reference: live bytes of the run, phase by phase, where host and device are one memory, exact
    but for scalars; and the bytes of the files, each process's the same. At the peak of loading one
    trained parameter, of 1032 x 512 or of rank 8, may be let go of late or in time."""
    record = _recorded(keys(method, loop, dict(lever)), tmp_path / "nvme", processes)
    compare(record, (1032 if method == "full" else 8) * 512 * 4)
    files = sum(f.stat().st_size for f in (tmp_path / "nvme" / "disk").rglob("*.swp"))
    assert files == record["plan"]["disk_bytes"] * max(1, processes) > 0


def test_what_lies_on_a_disk_is_trained_the_same(
    keys: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Reference: the plain run for states; for parameters, which are computed with in bfloat16,
    the run that keeps them in memory, bit for bit. What cannot be resumed is refused."""
    plain = lowres.run(
        lowres.load_recipe(keys("full", {}, None)), output_folder=tmp_path / "plain", quiet=True,
        plan=False,
    )  # fmt: skip
    states = _recorded(keys("full", {}, dict(STATES)), tmp_path / "states")
    assert states["losses"] == pytest.approx(plain.losses, rel=TOLERANCE)
    in_memory = ZERO3 | {"offload_optimizer": "cpu"}
    reference = _recorded(keys("lora", BF16, in_memory), tmp_path / "memory")
    both = _recorded(keys("lora", BF16, dict(BOTH)), tmp_path / "both")
    assert both["losses"] == reference["losses"]
    saved = keys("full", {"save_every": 2}, STATES | {"nvme_path": str(tmp_path)})
    with pytest.raises(InputError, match="do not bring the weights back"):
        lowres.load_recipe(saved)


def test_what_would_be_rounded_on_its_way_is_refused(
    keys: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: on a device without float16 DeepSpeed writes float32 parameters as bfloat16."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
    made = lowres.load_recipe(keys("lora", {}, BOTH | {"nvme_path": str(tmp_path / "disk")}))
    with pytest.raises(InputError, match="rounds what it writes to nvme to bfloat16"):
        lowres.run(made, output_folder=tmp_path / "run", quiet=True, plan=False)
