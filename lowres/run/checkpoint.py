"""Checkpoints to resume from: written aside and renamed,
so that a killed run leaves only whole ones.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lowres.bridges import accelerate, bases, peft
from lowres.core.errors import InputError, LowresError
from lowres.core.example import Row
from lowres.core.learner import Learner
from lowres.core.recipe import Recipe
from lowres.core.record import Event
from lowres.core.units import MIB, format_bytes
from lowres.making.data import digest_of_rows
from lowres.run.out_of_memory import is_out_of_memory

_NAME = re.compile(r"checkpoint-(\d+)")
_PROGRESS = "progress.json"
NEARLY_FULL_BYTES = 16 * MIB


@dataclass
class Progress:
    """What the run has done so far, besides weights and optimizer states.

    Args:
        step: Updates made.
        digest: Of the recipe.
        recipe: Resolved, to say what differs when it is another one.
        micro_batch_size: In use; smaller than the recipe's after recovering from lack of memory.
        train_seconds: Spent in updates, over all parts of a run that was resumed.
        chosen: Blocks that a freezing chose by looking at data, which need not choose them again.
        entries: How many entries of each module a method chose so; which, its adapter knows.
        rows: Digest of the training rows.
        base: Digest of the checkpoint that the run began from, where its files are at hand.
    """

    step: int
    digest: str
    recipe: dict[str, Any]
    micro_batch_size: int
    train_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    chosen: list[str] | None = None
    entries: dict[str, int] | None = None
    rows: str | None = None
    base: str | None = None


def none_done(recipe: Recipe, learner: Learner, rows: Sequence[Row]) -> Progress:
    """Of a run that begins."""
    return Progress(
        step=0,
        digest=recipe.digest,
        recipe=recipe.resolved(),
        micro_batch_size=recipe.loop.micro_batch_size,
        rows=digest_of_rows(rows),
        base=bases.digest_of(peft.unwrap_adapted(learner.base)),
    )


def save(accelerator: Any, output: Path, progress: Progress, keep: int) -> int:
    """Write `checkpoint-<step>` and delete the oldest beyond `keep`; returns its bytes.

    Raises:
        LowresError: When the disk is full or not writable; earlier checkpoints stay whole.
    """
    final = output / f"checkpoint-{progress.step}"
    aside = output / f"checkpoint-{progress.step}.partial"
    try:
        with writing(f"the checkpoint of update {progress.step}", output):
            if accelerator.is_main_process:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            accelerator.wait_for_everyone()
            accelerate.save_state(accelerator, aside)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (aside / _PROGRESS).write_text(json.dumps(asdict(progress)), encoding="utf-8")
                _to_disk(*aside.rglob("*"), aside)
                shutil.rmtree(final, ignore_errors=True)
                aside.rename(final)
                _to_disk(output)
                for old in checkpoints(output)[:-keep]:
                    shutil.rmtree(old)
            accelerator.wait_for_everyone()
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder_bytes(final)


def _to_disk(*paths: Path) -> None:
    """Wait until it lies on the disk. Before that a power cut leaves empty files under the new
    name, and those that it takes the place of must not be deleted."""
    for path in paths:
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        elif os.name == "posix":  # elsewhere a folder cannot be opened
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            except OSError as error:
                # Some file systems of networks do so only for files.
                if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
                    raise
            finally:
                os.close(handle)


@contextlib.contextmanager
def writing(what: str, folder: Path, *, resumable: bool = True) -> Iterator[None]:
    """Turn a failed write into one message.

    The system says when a disk is full. torch and safetensors have their own errors, of which that
    is told from the room that is left.

    Args:
        resumable: Whether it is a run that writes, which can go on from a checkpoint.

    Raises:
        LowresError: When what is being written does not fit or cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(_nearest(folder)).free
        code = getattr(error, "errno", None)
        full = code == errno.ENOSPC or (code is None and free < NEARLY_FULL_BYTES)
        mend = "make room" if full else "mend that"
        raise LowresError(
            f"{what} could not be written to {folder}: {'the disk is full' if full else error} "
            f"({format_bytes(free)} free); "
            + (f"checkpoints written before are whole, so {mend} and --resume"
               if resumable else f"{mend}, or name another folder")
        ) from error  # fmt: skip


def _nearest(folder: Path) -> Path:
    """The folder, or what is there of the way to it."""
    return next((p for p in (folder, *folder.absolute().parents) if p.exists()), Path())


def checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints of an output folder, oldest first."""
    found = [p for p in output.glob("checkpoint-*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def load(accelerator: Any, folder: Path) -> None:
    """Put weights, optimizer states and random states back.

    Raises:
        InputError: When a file is damaged or not there, or belongs to another recipe.
    """
    try:
        accelerate.load_state(accelerator, folder)
    # Each kind of file has errors of its own for one that ends too soon or says something else.
    except Exception as error:
        if isinstance(error, LowresError) or is_out_of_memory(error):
            raise
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> InputError:
    """Names the checkpoint before, which is not taken unasked: it repeats updates."""
    reason = str(error).partition("\n")[0] or type(error).__name__
    own = _NAME.fullmatch(folder.resolve().name)
    there = checkpoints(folder.resolve().parent) if own else []
    before = [p for p in there if own and _step(p) < int(own[1])]
    go_on = (
        f"`--resume {before[-1]}` goes on from the one before"
        if before
        else "there is none before it; begin anew, in another folder"
    )
    return InputError(f"'{folder}'", [f"is damaged ({reason}); {go_on}"])


def progress_of(folder: Path, digest: str, recipe: dict[str, Any]) -> Progress:
    """Read how far a checkpoint got.

    Raises:
        InputError: When it is none, damaged, or of another recipe (naming what differs).
    """
    try:
        raw = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
        raw["events"] = [Event(**e) for e in raw["events"]]
        progress = Progress(**raw)
    except FileNotFoundError as error:
        raise InputError(f"'{folder}'", [f"is no checkpoint of lowres: {error}"]) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(folder, error) from None
    if progress.digest != digest:
        there, here = _flat(progress.recipe), _flat(recipe)
        differs = [
            f"`{key}` was {there.get(key)!r}, is {here.get(key)!r}"
            for key in sorted(there.keys() | here.keys())
            if there.get(key) != here.get(key) and not key.startswith("budget.")
        ]
        raise InputError(
            f"'{folder}'",
            [*differs, "it belongs to another recipe; resume with that one, or start anew"],
        )
    return progress


def stop_at_others(folder: Path, there: Progress, here: Progress) -> None:
    """Raise InputError where a run that is to go on reads other rows or weights than before."""
    changed = []
    if there.rows not in (None, here.rows):
        changed.append("the training rows are not those that it was trained on")
    if None not in (there.base, here.base) and there.base != here.base:
        changed.append("the weights of model.checkpoint are not those that it began from")
    if changed:
        text = "bring back the files that were there, or start anew, in another folder"
        raise InputError(f"'{folder}'", [*changed, text])


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and value:
        items = enumerate(value)  # type: ignore[assignment]
    else:
        return {path: value}
    out: dict[str, Any] = {}
    for key, below in items:
        out |= _flat(below, f"{path}.{key}" if path else str(key))
    return out


def folder_bytes(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process deletes old checkpoints
            total += file.stat().st_size if file.is_file() else 0
    return total
