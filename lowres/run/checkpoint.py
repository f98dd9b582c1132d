"""Checkpoints to resume from: written aside and renamed,
so that a killed run leaves only whole ones.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowres.core.errors import InputError, LowresError
from lowres.core.record import Event
from lowres.core.units import format_bytes

_NAME = re.compile(r"checkpoint-(\d+)")
_PROGRESS = "progress.json"


@dataclass
class Progress:
    """What the run has done so far, besides weights and optimizer states.

    Args:
        step: Updates made.
        digest: Of the recipe.
        recipe: Resolved, to say what differs when it is another one.
        micro_batch_size: In use; smaller than the recipe's after recovering from lack of memory.
    """

    step: int
    digest: str
    recipe: dict[str, Any]
    micro_batch_size: int
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


def save(accelerator: Any, output: Path, progress: Progress, keep: int) -> int:
    """Write `checkpoint-<step>` and delete the oldest beyond `keep`; returns its bytes.

    Raises:
        LowresError: When the disk is full or not writable; earlier checkpoints stay whole.
    """
    final = output / f"checkpoint-{progress.step}"
    aside = output / f"checkpoint-{progress.step}.partial"
    problem = None
    try:
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(aside), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (aside / _PROGRESS).write_text(json.dumps(asdict(progress)), encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            for old in checkpoints(output)[:-keep]:
                shutil.rmtree(old)
    except (OSError, RuntimeError) as error:
        # torch and safetensors report a full disk as RuntimeError or as their own OSError.
        problem = error
    if problem is not None:
        shutil.rmtree(aside, ignore_errors=True)
        full = getattr(problem, "errno", None) == errno.ENOSPC or "space" in str(problem).lower()
        if not full and not isinstance(problem, OSError) and "write" not in str(problem).lower():
            raise problem
        free = shutil.disk_usage(output).free if output.exists() else 0
        raise LowresError(
            f"the checkpoint of update {progress.step} could not be written to {output}: "
            f"{'the disk is full' if full else problem} ({format_bytes(free)} free); earlier "
            "checkpoints are whole, so make room and --resume"
        ) from problem
    return folder_bytes(final)


def checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints of an output folder, oldest first."""
    found = [p for p in output.glob("checkpoint-*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def load(accelerator: Any, folder: Path) -> None:
    """Put weights, optimizer states and random states back."""
    accelerator.load_state(str(folder))


def progress_of(folder: Path, digest: str, recipe: dict[str, Any]) -> Progress:
    """Read how far a checkpoint got.

    Raises:
        InputError: When it is no checkpoint, or of another recipe (naming what differs).
    """
    try:
        raw = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
        raw["events"] = [Event(**e) for e in raw["events"]]
        progress = Progress(**raw)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"'{folder}'", [f"is no checkpoint of lowres: {error}"]) from None
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
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
