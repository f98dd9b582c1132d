"""The folder of a run: whose it is, what may go on in it, and what stays as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lowres
from lowres.bridges import accelerate, transformers
from lowres.core.errors import DoesNotFit, InputError, Interrupted, LowresError
from lowres.core.record import from_file
from lowres.making import build
from lowres.memory.meter import Meter
from lowres.run import checkpoint, execute, limits
from lowres.run.session import TrainingSession

TOO_SMALL = {"host_gib": 1e-6}


@pytest.fixture(scope="module")
def keys(raw_recipe: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return raw_recipe(loop={"steps": 4, "save_every": 2})


@pytest.fixture(scope="module")
def finished(keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "out"
    run(keys, output_folder=folder)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The finished run, to be spoiled."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def run(keys: dict[str, Any], plan: bool = False, **changes: Any) -> Any:
    return lowres.run(lowres.load_recipe(keys), quiet=True, plan=plan, **changes)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["plan", "load", "first update"])
def test_going_on_in_vain_leaves_record_and_losses_as_they_were(
    where: str, keys: dict[str, Any], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: what an earlier part of the run wrote stays until an update was made."""
    before = content(copied)
    if where == "load":
        monkeypatch.setattr(build, "assemble", stop)
    elif where == "first update":
        monkeypatch.setattr(TrainingSession, "update", stop)
    else:
        keys = keys | {"budget": TOO_SMALL}
    with pytest.raises(DoesNotFit if where == "plan" else Interrupted):
        run(keys, plan=where == "plan", resume=str(copied / "checkpoint-2"))
    after = content(copied)
    assert after["record.json"] == before["record.json"]
    assert after["losses.jsonl"] == before["losses.jsonl"]


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.bin", "progress.json"])
def test_a_damaged_checkpoint_is_told_with_the_one_before(
    name: str, keys: dict[str, Any], copied: Path
) -> None:
    """Behaviour: no traceback, and nothing is taken in its place unasked."""
    before = content(copied)
    os.truncate(copied / "checkpoint-4" / name, 900 if name != "progress.json" else 20)
    os.remove(copied / "record.json")  # as of a run that was killed
    older = copied.resolve() / "checkpoint-2"
    with pytest.raises(InputError) as told:
        run(keys, output_folder=copied, resume="latest")
    (problem,) = told.value.problems
    assert told.value.subject == f"'{copied / 'checkpoint-4'}'"
    assert problem.text.startswith("is damaged (")
    assert problem.text.endswith(f"`--resume {older}` goes on from the one before")
    assert content(copied)["losses.jsonl"] == before["losses.jsonl"]
    shutil.rmtree(older)
    with pytest.raises(InputError, match=r"is damaged .* there is none before it"):
        run(keys, output_folder=copied, resume="latest")


def test_a_folder_of_a_run_that_never_trained_is_free(keys: dict[str, Any], tmp_path: Path) -> None:
    """Behaviour: one was killed while it planned, one was refused by its plan."""
    killed, refused = tmp_path / "killed", tmp_path / "refused"
    killed.mkdir()
    (killed / ".claimed").touch()
    with pytest.raises(DoesNotFit):
        run(keys | {"budget": TOO_SMALL}, plan=True, output_folder=refused)
    assert [p.name for p in refused.iterdir()] == ["record.json"]
    for folder in (killed, refused):
        assert run(keys, output_folder=folder).outcome == "ok"


def test_what_lies_in_a_folder_decides_what_is_advised(
    keys: dict[str, Any], copied: Path, tmp_path: Path
) -> None:
    """Behaviour: a finished run, a checkpoint, updates without one, something else, a file."""

    def refusal(folder: Path) -> str:
        before = content(folder) if folder.is_dir() else {}
        with pytest.raises(InputError) as told:
            run(keys, output_folder=folder)
        before.pop(".claimed", None)
        assert not before or content(folder) == before
        return str(told.value)

    text = refusal(copied)
    assert "a finished run" in text and "--output" in text and "--resume" not in text
    (copied / "record.json").unlink()
    text = refusal(copied)
    assert "checkpoint-4" in text and "--resume" in text
    for name in ("checkpoint-2", "checkpoint-4", "model", "predictions"):
        shutil.rmtree(copied / name, ignore_errors=True)
    (copied / ".claimed").touch()
    with pytest.raises(InputError, match="exists and is not empty; --output"):
        run(keys, output_folder=copied)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "recipe.yaml").write_text("mine")
    for claimed in (False, True):  # of a run that was killed
        if claimed:
            (mine / ".claimed").touch()
        text = refusal(mine)
        assert "exists and is not empty" in text and "--resume" not in text
        assert (mine / "recipe.yaml").read_text() == "mine"
    assert "is a file" in refusal(mine / "recipe.yaml")


@pytest.mark.parametrize("resume", [None, "latest"])
def test_two_runs_never_write_one_folder(
    resume: str | None, keys: dict[str, Any], copied: Path
) -> None:
    """Behaviour: the second is told who writes there; the first keeps the folder."""
    from lowres.run.claim import Claim

    (copied / "record.json").unlink()
    before = content(copied)
    first = Claim(copied)
    with pytest.raises(InputError, match=rf"another run \(process {os.getpid()} on .*--output"):
        run(keys, output_folder=copied, resume=resume)
    assert content(copied).keys() == before.keys() | {".claimed"}
    with pytest.raises(InputError, match="another run"):
        Claim(copied)
    first.release()
    assert content(copied) == before
    assert run(keys, output_folder=copied, resume="latest").outcome == "ok"


def test_a_disk_that_is_not_full_is_not_called_full(tmp_path: Path) -> None:
    """Behaviour: a file stands where a folder should be; only a run has something to resume."""
    (tmp_path / "q.yaml").touch()
    into = tmp_path / "q.yaml" / "x"
    for resumable in (True, False):
        with (
            pytest.raises(LowresError, match="Not a directory") as told,
            checkpoint.writing("the model", into, resumable=resumable),
        ):
            into.mkdir()
        assert "disk is full" not in str(told.value) and "(0 B free)" not in str(told.value)
        assert ("--resume" in str(told.value)) == resumable


def test_a_checkpoint_lies_on_the_disk_before_it_takes_a_place(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: a power cut loses what the system still holds back. So each file is written out
    before the folder has its name, and the name before the checkpoint before it is deleted."""
    done: list[tuple[str, Any]] = []
    rename, rmtree = Path.rename, shutil.rmtree

    def named(path: Path, target: Path) -> Path:
        done.append(("named", target.name))
        return rename(path, target)

    def deleted(path: Path, *words: Any, **names: Any) -> None:
        done.append(("deleted", Path(path).name))
        rmtree(path, *words, **names)

    monkeypatch.setattr(os, "fsync", lambda file: done.append(("synced", os.fstat(file).st_ino)))
    monkeypatch.setattr(Path, "rename", named)
    monkeypatch.setattr(shutil, "rmtree", deleted)
    keys = keys | {"loop": keys["loop"] | {"keep_checkpoints": 1}}
    run(keys, output_folder=tmp_path / "out")
    last = tmp_path / "out" / "checkpoint-4"
    there = {("synced", path.stat().st_ino) for path in (last, *last.rglob("*"))}
    name = done.index(("named", last.name))
    assert len(there) > 3 and there <= set(done[:name])
    before = done.index(("deleted", "checkpoint-2"), name)
    assert ("synced", last.parent.stat().st_ino) in done[name:before]


@pytest.mark.parametrize("code, ends", [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_writes_out_no_folders_is_taken_as_it_is(
    code: int, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: those of networks may refuse; a disk that fails is an error."""

    def refuse(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError) if ends else contextlib.nullcontext():
        checkpoint._to_disk(tmp_path)


def test_a_run_that_stops_where_it_saved_saves_once(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: the checkpoint that is there is not deleted to be written again."""
    saved = []
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *words: saved.append(1) or save(*words))
    short = keys | {"loop": keys["loop"] | {"save_every": 1}, "budget": {"minutes": 1e-6}}
    with pytest.raises(LowresError, match="--resume"):
        run(short, output_folder=tmp_path / "out")
    assert len(saved) == 1 and (tmp_path / "out" / "checkpoint-1").is_dir()


@pytest.mark.parametrize("sent", [signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)])
def test_a_signal_while_scoring_costs_no_record(
    sent: int, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: training is over; what the signals do is as before afterwards."""
    before = signal.signal(sent, signal.SIG_DFL)  # nohup may have had it ignored
    monkeypatch.setattr(limits, "_leave_terminal", lambda: None)
    monkeypatch.setattr(execute, "evaluate", lambda *_: os.kill(os.getpid(), sent))
    with pytest.raises(Interrupted, match="stopped at once"):
        run(keys, output_folder=tmp_path / "out")
    record = from_file(tmp_path / "out" / "record.json")
    assert record.outcome == "interrupted" and len(record.losses) == 4
    assert (tmp_path / "out" / "model" / "README.md").is_file()
    assert signal.signal(sent, before) is signal.SIG_DFL


def test_a_device_that_fails_twice_costs_no_record(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: after an illegal access every later question ends in the same error."""

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(execute, "evaluate", fail)
    monkeypatch.setattr(Meter, "allocator_retries", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(keys, output_folder=tmp_path / "out")
    record = from_file(tmp_path / "out" / "record.json")
    assert record.outcome == "failed" and len(record.losses) == 4


def test_a_disk_that_fills_up_leaves_no_half_of_the_trained_model(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: what bears the name is whole, and the record says what happened."""

    def fill(model: Any, tokenizer: Any, folder: Path) -> None:
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(transformers, "save", fill)
    with pytest.raises(LowresError, match="the model could not be written .*disk is full"):
        run(keys, output_folder=tmp_path / "out")
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith("model")]
    assert "disk is full" in str(from_file(tmp_path / "out" / "record.json").error)


def test_names_mean_what_they_say(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: the home folder; a recipe whose name has the letters of a pattern."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "read", stop)
    one = dataclasses.replace(lowres.load_recipe(keys), source="lora[1].yaml")
    for asked, place in (("~/a", "home/a"), (None, "runs/lora[1]-1"), (None, "runs/lora[1]-2")):
        with pytest.raises(Interrupted):
            lowres.run(one, output_folder=asked, quiet=True, plan=False)
        assert (tmp_path / place / "record.json").is_file()


def test_a_process_that_fails_alone_does_not_wait_for_the_others() -> None:
    """Behaviour: leaving the group waits for all of it; a single process has none to wait for."""
    done: list[str] = []
    tracker = SimpleNamespace(finish=lambda: done.append("tracker"))
    for processes, together in ((1, False), (2, True), (2, False)):
        group = SimpleNamespace(
            num_processes=processes, trackers=[tracker], end_training=lambda: done.append("group")
        )
        accelerate.end_trackers(group, together=together)
    assert done == ["group", "group", "tracker"]


def test_a_refusal_after_loading_leaves_nothing(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: what only the loaded model can tell; the same folder may be asked for again."""

    def refuse(*_: Any) -> None:
        raise InputError("the recipe", ["its head has no weight"])

    with monkeypatch.context() as patched:
        patched.setattr(build, "engine_of", refuse)
        with pytest.raises(InputError, match="no weight"):
            run(keys, output_folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()
