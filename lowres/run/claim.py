"""The folder of a run: claimed once, never overwritten, gone on in from a checkpoint."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any, TextIO

from lowres.bridges import accelerate
from lowres.core import record as record_module
from lowres.core.errors import InputError
from lowres.core.recipe import Recipe
from lowres.core.record import RunRecord
from lowres.run.checkpoint import checkpoints
from lowres.run.output import LOSSES, RECORD, stem

if sys.platform != "win32":
    import fcntl

CLAIM = ".claimed"
DEFAULT_ROOT = Path("runs")


class Claim:
    """A folder that no other run writes to, until it is released or this process ends.

    The kernel keeps the lock, so that of a run that was killed only a file is left, not a claim;
    `left` says that there was one.

    Raises:
        InputError: When another run writes to it, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.left = (folder / CLAIM).exists()
        try:
            self._file = _locked(folder / CLAIM)
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {platform.node()}")
            self._file.flush()
        except OSError as error:
            raise InputError(f"'{folder}'", [f"cannot be written: {error.strerror}"]) from None

    def release(self, *, if_empty: bool = False) -> None:
        """Give it up; with `if_empty`, leave nothing behind of a run that wrote nothing."""
        # Deleted before it is closed: afterwards it may be another's.
        with contextlib.suppress(OSError):
            (self.folder / CLAIM).unlink()
        self._file.close()
        if if_empty and self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def _locked(path: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read()
            file.close()
            text = f"another run{f' ({who})' if who else ''} is writing to it; wait for its end, "
            raise InputError(
                f"'{path.parent}'", [f"{text}stop it, or name another folder with --output DIR"]
            ) from None
        except OSError:
            pass  # Some network file systems know no locks.
        # A run that ended just now may have deleted the file that was opened.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def folder_of(
    recipe: Recipe, accelerator: Any, asked: str | Path | None, resume: str | None
) -> tuple[Path, Path | None, Claim | None]:
    """The run's folder, chosen by the main process for all; the checkpoint to go on from; and the
    claim on the folder, which the main process alone holds.
    """
    asked = None if asked is None else Path(asked).expanduser()
    chosen: list[Any] = [None, None, None]
    claim: Claim | None = None
    if accelerator.is_main_process:
        try:
            if resume is not None:
                chosen[:2] = find_resumable(recipe, asked, resume)
                claim = Claim(chosen[0])
            else:
                claim = begin(recipe, asked)
                chosen[0] = claim.folder
        except InputError as error:
            chosen[2] = error
    folder, found, problem = accelerate.from_main_process(accelerator, chosen)
    if problem is not None:
        raise problem
    return folder, found, claim


def begin(recipe: Recipe, asked: Path | None) -> Claim:
    """Make the folder of a new run: the one asked for,
    else `runs/<recipe>-<n>` with the next free n.

    Raises:
        InputError: When the folder holds something or is another run's, or cannot be written.
    """
    folder = asked or _next(recipe)
    try:
        if folder.is_file():
            raise InputError(f"'{folder}'", ["it is a file; --output names a folder"])
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"'{folder}'", [f"cannot be written: {error.strerror}"]) from None
    claim = Claim(folder)
    content = {p.name for p in folder.iterdir()} - {CLAIM}
    if content and (claim.left or RECORD in content) and _never_trained(folder, content):
        for name in content:
            (folder / name).unlink()
    elif content:
        claim.release()
        raise InputError(f"'{folder}'", [_what_to_do(folder)])
    return claim


def _never_trained(folder: Path, content: set[str]) -> bool:
    """Whether a run left all of it before its first update, with nothing that is worth keeping. A
    recipe is: it may be the user's own, even the one that is to run."""
    record = _record_in(folder)
    return (
        content <= {RECORD, LOSSES}
        and (RECORD not in content or (record is not None and not record.losses))
        and (LOSSES not in content or not (folder / LOSSES).stat().st_size)
    )


def _what_to_do(folder: Path) -> str:
    record, there = _record_in(folder), checkpoints(folder)
    if record is not None and record.outcome == "ok":
        return "it holds a finished run; --output DIR names another folder"
    if there:
        return f"it holds {there[-1].name}; --resume goes on with it, --output DIR names another"
    return "it exists and is not empty; --output DIR names another folder"


def _record_in(folder: Path) -> RunRecord | None:
    """None where there is none that can be read."""
    with contextlib.suppress(InputError):
        return record_module.from_file(folder / RECORD)
    return None


def _next(recipe: Recipe) -> Path:
    return DEFAULT_ROOT / f"{stem(recipe)}-{max(_numbered(recipe), default=0) + 1}"


def stop_if_finished(folder: Path, found: Path) -> None:
    """Refuse to go on with a run that ended well: its record would be replaced by a poorer one.

    Raises:
        InputError: When the record says ok and the checkpoint is the last one.
    """
    path = folder / RECORD
    if path.exists():
        record = record_module.from_file(path)
        if record.outcome == "ok" and found.name == f"checkpoint-{len(record.losses)}":
            raise InputError(f"'{folder}'", ["the run is finished; there is nothing to resume"])


def find_resumable(recipe: Recipe, asked: Path | None, resume: str) -> tuple[Path, Path]:
    """The output folder and the checkpoint to go on from.

    Args:
        resume: `latest`, or the path of a checkpoint.

    Raises:
        InputError: When there is none.
    """
    if resume != "latest":
        folder = Path(resume).expanduser()
        if asked is not None and asked.resolve() != folder.resolve().parent:
            raise InputError(
                "the command",
                [f"--resume {folder} goes on in its own folder; drop --output {asked}"],
            )
        if not folder.is_dir():
            raise InputError(f"'{folder}'", ["there is no such checkpoint to resume from"])
        return folder.resolve().parent, folder
    if asked is not None:
        runs = [asked]
    else:
        runs = [p for _, p in sorted(_numbered(recipe).items())]
    if runs and (there := checkpoints(runs[-1])):
        return runs[-1], there[-1]
    where = runs[-1] if runs else f"{DEFAULT_ROOT}/{stem(recipe)}-*"
    # Not gone on with unasked: it may be a run that was meant to be left.
    before = [there[-1] for run in runs[:-1] if (there := checkpoints(run))]
    mend = (
        f"`--resume {before[-1]}` goes on with an earlier run"
        if before
        else "loop.save_every writes them, or run without --resume"
    )
    raise InputError(f"'{where}'", [f"holds no checkpoint to resume from; {mend}"])


def _numbered(recipe: Recipe) -> dict[int, Path]:
    """The `runs/<recipe>-<n>` that are there, by n."""
    named = re.compile(re.escape(stem(recipe)) + r"-(\d+)")
    there = DEFAULT_ROOT.iterdir() if DEFAULT_ROOT.is_dir() else ()
    return {int(found[1]): p for p in there if (found := named.fullmatch(p.name))}
