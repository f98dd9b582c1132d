"""DeepSpeed's ZeRO against the plain run: one and two processes, resumed, read by plain PEFT."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lowres
from tests.conftest import ROOT
from tests.equivalence.test_peft_format import READER

ZERO2 = {"name": "zero"}
# Without `whole_elements` all weights of so small a model would stay whole.
ZERO3 = ZERO2 | {"stage": 3, "offload_parameters": "cpu", "whole_elements": 0}
CASES = [
    pytest.param(ZERO2, 0, marks=pytest.mark.slow),
    pytest.param(ZERO3, 0, marks=pytest.mark.slow),
    pytest.param(ZERO2, 1, marks=pytest.mark.slow),
    pytest.param(ZERO3, 1, marks=pytest.mark.slow),
    pytest.param(ZERO2, 2, marks=pytest.mark.slow),
    pytest.param(ZERO3, 2),
]
SMALL = {"name": "zero", "bucket_elements": 20_000}
"""Gradients of the tiny model fill several buckets."""
PLANNED = [
    pytest.param(SMALL, "full", {}, 0),
    pytest.param(SMALL | {"offload_optimizer": "none"}, "full", {}, 2, marks=pytest.mark.slow),
    pytest.param(SMALL | {"offload_optimizer": "none"}, "lora", {"precision": "bf16"}, 0,
                 marks=pytest.mark.slow),
    pytest.param(SMALL | {"stage": 1}, "full", {"precision": "bf16"}, 0, marks=pytest.mark.slow),
    pytest.param(SMALL | {"stage": 1, "offload_optimizer": "none"}, "full", {}, 0,
                 marks=pytest.mark.slow),
    pytest.param({"name": "zero", "config": {"zero_optimization": {
        "stage": 2, "overlap_comm": True, "reduce_bucket_size": 20_000}}},
        "full", {}, 0, marks=pytest.mark.slow),
    pytest.param({"name": "zero", "config": {"zero_optimization": {
        "stage": 1, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto"}}},
        "lora", {}, 0, marks=pytest.mark.slow),
]  # fmt: skip


def _divided(optimizer: str, parameters: str, **more: Any) -> dict[str, Any]:
    """Stage 3 whose buckets, and what stays whole, are small for the tiny model too."""
    zero = {
        "stage": 3, "reduce_bucket_size": 2_000, "stage3_prefetch_bucket_size": 2_000,
        "stage3_param_persistence_threshold": 100,
        "offload_optimizer": {"device": optimizer}, "offload_param": {"device": parameters},
    }  # fmt: skip
    return {"name": "zero", "config": {"zero_optimization": zero | more}}


PLANNED += [
    pytest.param(_divided("none", "none"), "full", {}, 2),
    pytest.param(_divided("none", "none", stage3_max_reuse_distance=2_000), "lora", {}, 2,
                 marks=pytest.mark.slow),
    pytest.param(_divided("cpu", "cpu"), "full", {}, 0, marks=pytest.mark.slow),
    pytest.param(_divided("cpu", "cpu"), "lora", {"precision": "bf16"}, 2,
                 marks=pytest.mark.slow),
    pytest.param(_divided("none", "cpu", sub_group_size=3_000, reduce_bucket_size="auto"), "full",
                 {"precision": "bf16"}, 0, marks=pytest.mark.slow),
]  # fmt: skip
SCALARS_BYTES = 4096
"""Norms, flags and learning rates, which are made as tensors and not planned."""
LATE_BYTES = 66 * 16 * 4
"""The largest parameter. Stage 3 has each of them whole for a moment as it loads, and gloo's thread
may let go of one when the next is there: sometimes, and the plan is made for that."""
TOLERANCE = 1e-5
"""Of losses: sums over processes and buckets are made in another order."""


@pytest.fixture(scope="module")
def keys(raw_recipe: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    loop = {"steps": 4, "micro_batch_size": 2, "save_every": 2}
    return raw_recipe("encoder", method="lora", loop=loop)


@pytest.fixture(scope="module")
def plain(keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("plain") / "run"
    return lowres.run(lowres.load_recipe(keys), output_folder=folder, quiet=True, plan=False)


def launched(recipe: Path, processes: int, stage: int, *arguments: str) -> str:
    """Run in processes of its own: none is without a launcher, else accelerate's starts so many
    with the configuration in the recipes. What counts is the record: DeepSpeed may abort while
    Python ends."""
    run = ["-m", "lowres", "run", str(recipe), *arguments]
    command = [sys.executable, *run]
    if processes:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        config = ROOT / "recipes" / "accelerate" / f"zero{stage}-cpu-offload.yaml"
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config),
            "--num_processes", str(processes), "--main_process_port", str(port), *run,
        ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    return done.stderr[-3000:]


@pytest.mark.parametrize(("lever", "processes"), CASES)
def test_the_losses_are_those_of_the_plain_run(
    lever: dict[str, Any], processes: int, keys: dict[str, Any], plain: Any, tmp_path: Path
) -> None:
    """Reference: the plain run, for losses, scores, the adapter and what plain PEFT makes of it.
    Resumed it is equal bit for bit."""
    recipe, whole, again = tmp_path / "r.yaml", tmp_path / "whole", tmp_path / "again"
    recipe.write_text(yaml.safe_dump(keys | {"levers": [lever]}))
    stage = lever.get("stage", 2)
    said = launched(recipe, processes, stage, "--output", str(whole), "--no-plan")
    assert (whole / "record.json").exists(), said
    record = json.loads((whole / "record.json").read_text())
    assert record["outcome"] == "ok" and record["environment"]["processes"] == max(1, processes)
    assert record["losses"] == pytest.approx(plain.losses, rel=TOLERANCE)
    assert [s["value"] for s in record["scores"]] == pytest.approx(
        [s.value for s in plain.scores], rel=TOLERANCE
    )

    again.mkdir()
    shutil.copytree(whole / "checkpoint-2", again / "checkpoint-2")
    said = launched(recipe, processes, stage, "--resume", str(again / "checkpoint-2"), "--no-plan")
    resumed = json.loads((again / "record.json").read_text())
    assert resumed["losses"] == record["losses"], said
    name = "model/adapter_model.safetensors"
    ours, theirs = load_file(whole / name), load_file(again / name)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())

    # What is near 0 is as far off as the largest of its tensor allows.
    reference = load_file(Path(plain.folder) / name)
    assert ours.keys() == reference.keys()
    for key, value in reference.items():
        torch.testing.assert_close(
            ours[key], value, rtol=TOLERANCE, atol=TOLERANCE * float(value.abs().max())
        )
    logits = [_logits(keys, Path(folder), tmp_path) for folder in (whole, plain.folder)]
    torch.testing.assert_close(*logits, rtol=TOLERANCE, atol=TOLERANCE)


def _logits(keys: dict[str, Any], run: Path, scratch: Path) -> torch.Tensor:
    """Of plain PEFT, for what a run saved."""
    subprocess.run(
        [sys.executable, "-c", READER, keys["model"]["checkpoint"], str(run / "model"),
         "classification", str(scratch / "logits.pt")],
        check=True, timeout=240, cwd=scratch,
    )  # fmt: skip
    found: torch.Tensor = torch.load(scratch / "logits.pt", weights_only=True)
    return found


def _both(keys: dict[str, Any], lever: dict[str, Any], folder: Path) -> tuple[Any, dict[str, Any]]:
    """The plain run's record, and that of a process of its own with the lever."""
    one = lowres.load_recipe(keys)
    plain = lowres.run(one, output_folder=folder / "plain", quiet=True, plan=False)
    (folder / "r.yaml").write_text(yaml.safe_dump(keys | {"levers": [lever]}))
    said = launched(folder / "r.yaml", 0, 2, "--output", str(folder / "run"), "--no-plan")
    assert (folder / "run" / "record.json").exists(), said
    record = json.loads((folder / "run" / "record.json").read_text())
    assert record["outcome"] == "ok", record["error"]
    return plain, record


USUAL = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "allgather_partitions": True, "allgather_bucket_size": 2e8, "overlap_comm": True,
        "reduce_scatter": True, "reduce_bucket_size": "auto", "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}  # fmt: skip
"""transformers' example for stage 2, without optimizer and scheduler."""


def test_a_json_with_auto_values_trains_the_same(keys: dict[str, Any], tmp_path: Path) -> None:
    """Reference: the plain run; four micro-batches an update, clipped."""
    (tmp_path / "ds.json").write_text(json.dumps(USUAL))
    lever = {"name": "zero", "config": str(tmp_path / "ds.json")}
    plain, record = _both(keys, lever, tmp_path)
    assert keys["loop"]["global_batch_size"] == 4 * keys["loop"]["micro_batch_size"]
    assert record["losses"] == pytest.approx(plain.losses, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "hira", "sara"])
def test_methods_that_read_whole_weights_train_the_same(
    method: str, raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Reference: the plain run. At stage 2 weights are whole in each process."""
    keys = raw_recipe("decoder", method=method, objective="label_words", loop={"steps": 4})
    plain, record = _both(keys, ZERO2, tmp_path)
    assert record["losses"] == pytest.approx(plain.losses, rel=TOLERANCE)


@pytest.mark.slow
def test_a_whole_model_is_saved_with_its_frozen_weights(
    raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Reference: what the plain run saves; frozen blocks bit for bit."""
    keys = raw_recipe("decoder", method="full", objective="label_words", loop={"steps": 4})
    keys |= {"freezing": {"name": "prefix", "frozen": 1}}
    _, record = _both(keys, ZERO3, tmp_path)
    plain, ours = (load_file(tmp_path / run / "model" / "model.safetensors")
                   for run in ("plain", "run"))  # fmt: skip
    assert plain.keys() == ours.keys()
    frozen = [key for key in plain if ".layers.0." in key]
    assert frozen and all(torch.equal(plain[key], ours[key]) for key in frozen)
    for key, value in plain.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_in_bfloat16_the_losses_are_those_of_the_plain_run_to_its_rounding(
    raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Reference: before the first update, bit for bit a model loaded in bfloat16, which computes
    without autocast (LoRA adds nothing yet, and no head is held wider); then the plain run under
    autocast, each of the two rounded to 8 bits. What is saved is in bfloat16; the run says so."""
    loop = {"steps": 4, "precision": "bf16"}
    keys = raw_recipe("decoder", method="lora", objective="label_words", loop=loop)
    plain, record = _both(keys, ZERO2, tmp_path)
    held = keys | {"model": keys["model"] | {"dtype": "bfloat16"}}
    held |= {"loop": keys["loop"] | {"precision": "no"}}
    first = lowres.run(
        lowres.load_recipe(held), output_folder=tmp_path / "held", quiet=True, plan=False
    )
    assert record["losses"][0] == first.losses[0] != plain.losses[0]
    assert record["losses"] == pytest.approx(plain.losses, rel=2 * 2**-8)
    saved = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert any("holds, computes with and saves" in event["text"] for event in record["events"])


def compare(record: dict[str, Any], late_bytes: int) -> None:
    """Hold the plan of a run against its live bytes, phase by phase; exact but for scalars.

    Args:
        late_bytes: That may be let go of late at the peak of loading, or in time.
    """
    assert record["plan"] is not None, record["events"]
    checked = 0
    for phase, measured in record["measured"]["phases"].items():
        if measured["live_bytes"] is not None:
            off = record["plan"]["phases"][phase]["live_bytes"] - measured["live_bytes"]
            late = late_bytes if phase == "load" else 0
            assert -SCALARS_BYTES <= off <= SCALARS_BYTES + late, (phase, off)
            checked += 1
    assert checked == 5


@pytest.mark.parametrize(("lever", "method", "loop", "processes"), PLANNED)
def test_the_plan_is_what_is_measured(
    lever: dict[str, Any],
    method: str,
    loop: dict[str, Any],
    processes: int,
    raw_recipe: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Reference: live bytes of the run, phase by phase, for the first process; exact but for
    scalars."""
    loop = {"steps": 2, "micro_batch_size": 2, "max_grad_norm": None} | loop
    stage = lever.get("stage", 2)
    if "config" in lever:
        stage = lever["config"]["zero_optimization"]["stage"]
        (tmp_path / "ds.json").write_text(json.dumps(lever["config"]))
        lever = lever | {"config": str(tmp_path / "ds.json")}
    keys = raw_recipe("decoder", method=method, objective="label_words", loop=loop, levers=[lever])
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(keys))
    said = launched(tmp_path / "r.yaml", processes, stage, "--output", str(tmp_path / "run"))
    assert (tmp_path / "run" / "record.json").exists(), said
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    compare(record, LATE_BYTES if stage == 3 else 0)


@pytest.mark.slow
def test_what_a_bucket_sends_is_planned(
    raw_recipe: Callable[..., dict[str, Any]], wide: Path, tmp_path: Path
) -> None:
    """Reference: live bytes of a run of stage 3 whose updates peak while a bucket of millions of
    gradients is sent, in one process too."""
    lever = {"name": "zero", "stage": 3, "offload_parameters": "cpu", "whole_elements": 0}
    loop = {"steps": 2, "micro_batch_size": 2, "max_grad_norm": None}
    keys = raw_recipe(
        objective="label_words", method="full", loop=loop, levers=[lever],
        model={"checkpoint": str(wide)},
    )  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(keys))
    said = launched(tmp_path / "r.yaml", 0, 3, "--output", str(tmp_path / "run"))
    assert (tmp_path / "run" / "record.json").exists(), said
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    planned = record["plan"]["phases"]["steady_steps"]
    measured = record["measured"]["phases"]["steady_steps"]["live_bytes"]
    assert planned["instant"].startswith("backward")
    assert abs(planned["live_bytes"] - measured) <= SCALARS_BYTES


def test_on_a_card_the_plan_parts_device_and_host(
    raw_recipe: Callable[..., dict[str, Any]],
) -> None:
    """Closed form: with states on the host, each trained parameter of float32 is there as master,
    gradient, two states and a copy to be sent: 20 bytes; the device holds none of these."""
    from lowres.memory import device as devices
    from lowres.planning.plan import plan

    planned = {}
    for place in ("cpu", "none"):
        lever = SMALL | {"offload_optimizer": place}
        loop = {"micro_batch_size": 8}
        keys = raw_recipe(method="full", objective="label_words", levers=[lever], loop=loop)
        planned[place] = plan(lowres.load_recipe(keys), devices.generic(8.0))
    trained = planned["cpu"].trainable
    steady = {place: found.phases["steady_steps"] for place, found in planned.items()}
    # Beside it the staging buffer of the largest parameter.
    assert 20 * trained <= steady["cpu"].host_bytes <= 26 * trained
    assert steady["none"].host_bytes == 0
    saved = steady["none"].live_bytes - steady["cpu"].live_bytes
    assert 8 * trained <= saved <= 20 * trained


SPOILED = """
import sys, torch, lowres
from lowres.bridges import deepspeed, transformers

recipe, folder, what = sys.argv[1:]
make, update, save = deepspeed.ZeroUpdates.__init__, deepspeed.ZeroUpdates.update, transformers.save


def pick(model, trained):
    return [p for p in model.parameters() if p.requires_grad == trained][-1]


def made(self, inner):
    make(self, inner)
    if what == "gradients":
        pick(self.learner.base, True).register_hook(lambda gradient: gradient * float("inf"))


def updated(self, lr, max_grad_norm):
    if what == "moved":
        self.engine.step = lambda: None
    if what == "frozen":
        frozen = pick(self.learner.base, False)
        with torch.no_grad():
            frozen.add_(1.0)
            if hasattr(frozen, "ds_tensor"):
                frozen.ds_tensor.add_(1.0)
    return update(self, lr, max_grad_norm)


def saved(model, tokenizer, into):
    save(model, tokenizer, into)
    if what == "saved":
        with torch.no_grad():
            pick(model, True).add_(1.0)


deepspeed.ZeroUpdates.__init__, deepspeed.ZeroUpdates.update = made, updated
transformers.save = saved
lowres.run(lowres.load_recipe(recipe), output_folder=folder, quiet=True)
"""
NOTICED = {
    "gradients": "are not finite in update 1",
    "moved": "have not changed at all",
    "frozen": "should be frozen and changed",
    "saved": "are not in",
}


@pytest.mark.parametrize(
    ("lever", "what"),
    [
        pytest.param(ZERO2, "gradients"),
        pytest.param(ZERO2, "moved", marks=pytest.mark.slow),
        pytest.param(ZERO2, "frozen", marks=pytest.mark.slow),
        pytest.param(ZERO2, "saved", marks=pytest.mark.slow),
        pytest.param(ZERO3, "gradients", marks=pytest.mark.slow),
        pytest.param(ZERO3, "moved", marks=pytest.mark.slow),
        pytest.param(ZERO3, "frozen", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_goes_wrong_is_noticed(
    lever: dict[str, Any], what: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    """Behaviour: the guards hold where gradients, states and parameters are divided."""
    keys = keys | {"levers": [lever], "loop": keys["loop"] | {"steps": 2, "save_every": None}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(keys))
    command = [sys.executable, "-c", SPOILED, str(tmp_path / "r.yaml"), str(tmp_path / "run"), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert (tmp_path / "run" / "record.json").exists(), done.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["outcome"] in ("failed", "diverged") and NOTICED[what] in record["error"]
