"""The folder of a run: claimed once, never overwritten, gone on in from a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lowres.bridges import accelerate
from lowres.core import record as record_module
from lowres.core.errors import InputError
from lowres.core.recipe import Recipe
from lowres.run.checkpoint import checkpoints
from lowres.run.output import RECORD, stem

CLAIM = ".claimed"
DEFAULT_ROOT = Path("runs")


def folder_of(
    recipe: Recipe, accelerator: Any, asked: str | Path | None, resume: str | None
) -> tuple[Path, Path | None]:
    """The run's folder, chosen by the main process for all; and the checkpoint to go on from."""
    asked = None if asked is None else Path(asked)
    chosen: list[Any] = [None, None, None]
    if accelerator.is_main_process:
        try:
            if resume is not None:
                chosen[:2] = find_resumable(recipe, asked, resume)
            else:
                chosen[0] = claim(recipe, asked)
        except InputError as error:
            chosen[2] = error
    folder, found, problem = accelerate.from_main_process(accelerator, chosen)
    if problem is not None:
        raise problem
    return folder, found


def claim(recipe: Recipe, asked: Path | None) -> Path:
    """Make the folder of a new run: the one asked for,
    else `runs/<recipe>-<n>` with the next free n.

    Raises:
        InputError: When the folder holds a run already, or cannot be written.
    """
    root = DEFAULT_ROOT
    if asked is not None:
        if asked.exists() and (not asked.is_dir() or any(asked.iterdir())):
            raise InputError(
                f"'{asked}'",
                [
                    "it exists and is not empty; --resume goes on with it, "
                    "--output DIR names another"
                ],
            )
        folder = asked
    else:
        taken = [_number(p, stem(recipe)) for p in root.glob(f"{stem(recipe)}-*")]
        folder = root / f"{stem(recipe)}-{max(taken, default=0) + 1}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Exclusive: of two runs that want the same folder, one is told.
        (folder / CLAIM).touch(exist_ok=False)
    except FileExistsError:
        raise InputError(f"'{folder}'", ["another run is beginning in it"]) from None
    except OSError as error:
        raise InputError(f"'{folder}'", [f"cannot be written: {error.strerror}"]) from None
    return folder


def release(folder: Path, *, if_empty: bool = False) -> None:
    """Give up the claim; with `if_empty`, leave nothing behind of a run that wrote nothing."""
    (folder / CLAIM).unlink(missing_ok=True)
    if if_empty and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


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
        folder = Path(resume)
        if asked is not None and asked.resolve() != folder.resolve().parent:
            raise InputError(
                "the command",
                [f"--resume {folder} goes on in its own folder; drop --output {asked}"],
            )
        if not folder.is_dir():
            raise InputError(f"'{folder}'", ["there is no such checkpoint to resume from"])
        return folder.resolve().parent, folder
    if asked is not None:
        candidates = [asked]
    else:
        runs = [p for p in DEFAULT_ROOT.glob(f"{stem(recipe)}-*") if _number(p, stem(recipe))]
        candidates = sorted(runs, key=lambda p: _number(p, stem(recipe)))[-1:]
    for folder in candidates:
        there = checkpoints(folder)
        if there:
            return folder, there[-1]
    where = asked or f"{DEFAULT_ROOT}/{stem(recipe)}-*"
    raise InputError(
        f"'{where}'",
        [
            "holds no checkpoint to resume from; loop.save_every writes them, "
            "or run without --resume"
        ],
    )


def _number(path: Path, name: str) -> int:
    found = re.fullmatch(re.escape(name) + r"-(\d+)", path.name)
    return int(found.group(1)) if found else 0
