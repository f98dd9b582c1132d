"""A run that died and was resumed against the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lowres
from lowres.core.errors import InputError, OutOfTime

STEPS = 60


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Path:
    """A checkpoint with dropout: resuming must restore the random state too."""
    import shutil

    folder = tmp_path_factory.mktemp("dropping") / "model"
    shutil.copytree(checkpoints["encoder"], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def keys(raw_recipe: Callable[..., dict[str, Any]], dropping: Path) -> dict[str, Any]:
    return raw_recipe(
        "encoder", model={"checkpoint": str(dropping)}, method="lora",
        loop={"steps": STEPS, "save_every": 4, "eval_every": 10, "warmup_ratio": 0.2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    lowres.run(lowres.load_recipe(keys), output_folder=folder, quiet=True, plan=False)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "adapter_model.safetensors")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text().splitlines()]


def assert_same(folder: Path, whole: Path) -> None:
    assert losses(folder) == losses(whole)
    record = json.loads((folder / "record.json").read_text())
    assert record["outcome"] == "ok"
    assert record["losses"] == losses(whole)
    ours, theirs = weights(folder), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    there = json.loads((whole / "record.json").read_text())
    assert [s["value"] for s in record["scores"]] == [s["value"] for s in there["scores"]]


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_random_updates_and_resumed_equals_uninterrupted(
    times: int, keys: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    """Reference: the uninterrupted run. SIGKILL leaves no chance to save; bit-equal losses, weights
    and scores."""
    recipe, folder = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(keys))
    points = sorted(random.Random(time.time_ns()).sample(range(5, STEPS - 8), times))
    print("killed after updates", points)
    for number, point in enumerate(points):
        arguments = ["--resume"] if number else []
        process = subprocess.Popen(
            [
                sys.executable, "-m", "lowres", "run", str(recipe), "--output", str(folder),
                "--no-plan", *arguments,
            ],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        log = folder / "losses.jsonl"
        while process.poll() is None:
            if log.exists() and log.read_text().count("\n") >= point:
                process.kill()
                break
            time.sleep(0.001)
        assert process.wait() == -signal.SIGKILL, process.stderr.read() if process.stderr else ""
    lowres.run(
        lowres.load_recipe(keys), output_folder=folder, resume="latest", quiet=True, plan=False
    )
    assert_same(folder, whole)


def test_an_interrupt_saves_exits_130_and_resumes(
    keys: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    """Reference: the uninterrupted run. SIGINT, as Ctrl-C sends it."""
    recipe, folder = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(keys))
    process = subprocess.Popen(
        [sys.executable, "-m", "lowres", "run", str(recipe), "--output", str(folder)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip
    log = folder / "losses.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 6):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "saved" in said and "Traceback" not in said
    assert json.loads((folder / "record.json").read_text())["outcome"] == "interrupted"
    lowres.run(
        lowres.load_recipe(keys), output_folder=folder, resume="latest", quiet=True, plan=False
    )
    assert_same(folder, whole)


def test_a_terminal_that_is_closed_saves_and_resumes(
    keys: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    """Reference: the uninterrupted run. Its window is closed, or the connection to it breaks."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    fcntl = pytest.importorskip("fcntl")
    recipe, folder = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(keys))
    window, terminal = pty.openpty()

    def begin() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have had it ignored
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-m", "lowres", "run", str(recipe), "--output", str(folder), "--no-plan"],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=begin,
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    while b"loss" not in shown:
        shown += os.read(window, 1024)
    os.close(window)
    assert process.wait(timeout=60) == 130
    assert json.loads((folder / "record.json").read_text())["outcome"] == "interrupted"
    assert len(list(folder.glob("checkpoint-*"))) > 0
    lowres.run(
        lowres.load_recipe(keys), output_folder=folder, resume="latest", quiet=True, plan=False
    )
    assert_same(folder, whole)


def test_out_of_time_saves_and_the_rest_can_be_resumed(
    keys: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    """Reference: the uninterrupted run; the budget is no part of what a run computes."""
    folder = tmp_path / "out"
    with pytest.raises(OutOfTime, match="checkpoint-1"):
        late = lowres.load_recipe(keys | {"budget": {"minutes": 1e-6}})
        lowres.run(late, output_folder=folder, quiet=True, plan=False)
    assert json.loads((folder / "record.json").read_text())["outcome"] == "out_of_time"
    lowres.run(
        lowres.load_recipe(keys), output_folder=folder, resume="latest", quiet=True, plan=False
    )
    assert_same(folder, whole)


def test_resuming_with_another_recipe_names_what_differs(keys: dict[str, Any], whole: Path) -> None:
    """Behaviour: exit 2, and the finished record stays as it was."""
    before = (whole / "record.json").read_text()
    other = lowres.load_recipe(keys, ["optimizer.lr=0.5"])
    with pytest.raises(InputError, match=r"`optimizer.lr` was 0.001, is 0.5"):
        lowres.run(other, output_folder=whole, resume="latest", quiet=True, plan=False)
    assert (whole / "record.json").read_text() == before


def test_running_out_of_memory_halves_the_micro_batch_and_changes_no_loss(
    keys: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the run that did not run out; rounding of a sum in another order, without dropout.

    The error is raised by the engine at the third micro-batch, as the allocator would.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    from lowres.core.engine import BackPropagation

    plain = BackPropagation.accumulate
    calls = []

    def failing(self: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(args[0], FakeTensor):  # the plan before the run goes through here, too
            return plain(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        plain(self, *args, **kwargs)

    still = {**keys, "model": {"checkpoint": keys["model"]["checkpoint"]}}
    config = Path(still["model"]["checkpoint"]) / "config.json"
    text = config.read_text()
    config.write_text(text.replace("0.2", "0.0"))
    try:
        recipe = lowres.load_recipe(still, ["loop.steps=6"])
        reference = lowres.run(recipe, output_folder=tmp_path / "a", quiet=True)
        monkeypatch.setattr(BackPropagation, "accumulate", failing)
        record = lowres.run(recipe, output_folder=tmp_path / "b", quiet=True)
    finally:
        config.write_text(text)
    assert record.losses == pytest.approx(reference.losses, rel=1e-5)
    (event,) = [e for e in record.events if e.kind == "out_of_memory"]
    assert "micro-batch 4; it is repeated at 2" in event.text
