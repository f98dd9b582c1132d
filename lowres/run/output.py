"""What a run writes into its folder: record, recipe, losses and model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from lowres.core import record as record_module
from lowres.core.paths import write_whole
from lowres.core.recipe import Recipe
from lowres.core.record import RunRecord
from lowres.run.checkpoint import Progress

if TYPE_CHECKING:
    from typing import TextIO

RECORD = "record.json"
RECIPE = "recipe.yaml"
LOSSES = "losses.jsonl"
MODEL = "model"


def stem(recipe: Recipe) -> str:
    """A short name for a run of this recipe."""
    if recipe.source:
        return Path(recipe.source).stem
    return f"{recipe.task.name}-{recipe.method.name}"


class Losses:
    """`losses.jsonl`: a line an update. After a resume, lines past the checkpoint are dropped, but
    not before there is one to add.
    """

    def __init__(self, output: Path, active: bool, progress: Progress) -> None:
        self._path, self._active, self._begun = output / LOSSES, active, progress.step
        self._file: TextIO | None = None

    def _opened(self) -> TextIO:
        kept: list[str] = []
        if self._path.exists():
            kept = self._path.read_text(encoding="utf-8").splitlines()[: self._begun]
        file = self._path.open("w", encoding="utf-8")
        file.writelines(line + "\n" for line in kept)
        return file

    def add(
        self, step: int, loss: float, rate: float, norm: float | None, tokens_per_second: float
    ) -> None:
        if not self._active:
            return
        self._file = self._file or self._opened()
        line = {
            "step": step,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens_per_second": round(tokens_per_second, 1),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def in_place(folder: Path, write: Callable[[Path], None]) -> None:
    """Let a folder be written aside and renamed: what bears its name is whole."""
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        write(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_recipe(output: Path, recipe: Recipe) -> None:
    text = f"# Resolved from {recipe.source or 'a mapping'}; digest {recipe.digest}.\n"
    body = yaml.safe_dump(recipe.resolved(), sort_keys=False)
    (output / RECIPE).write_text(text + body, encoding="utf-8")


def write_record(output: Path, record: RunRecord) -> None:
    write_whole(output / RECORD, record_module.to_json(record))
