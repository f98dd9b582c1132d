"""One combination tried out: train, save, resume, and see that the same came out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from lowres.bridges import peft, tiny
from lowres.bridges import transformers as bridge
from lowres.core.errors import LowresError
from lowres.core.recipe import Recipe
from lowres.core.record import from_file
from lowres.run.execute import execute
from lowres.run.output import MODEL, RECIPE, RECORD

BIASED_LIKE = "package:lowres/assets/tiny_lm"

CLEAN = dict(os.environ)
"""Before a run has said in it that it is one of several processes."""

# Loaded where the processes of all combinations are forked from.
peft.preload()


def biased(folder: Path) -> Path:
    """A model with biases: what some methods train."""
    with bridge._quiet():
        return tiny.write_opt(folder, BIASED_LIKE)


def try_out(recipe: Recipe, folder: Path) -> None:
    """Two updates and a save; the second update again from the checkpoint of the first.

    Raises:
        InputError: Where lowres refuses the recipe.
        LowresError: Where what came out is not the same.
    """
    record = execute(recipe, output_folder=folder / "whole", quiet=True, force=True)
    again = folder / "again"
    again.mkdir()
    shutil.copytree(folder / "whole" / "checkpoint-1", again / "checkpoint-1")
    if any(lever.whole_process for lever in recipe.levers):
        _resume_elsewhere(folder / "whole" / RECIPE, again / "checkpoint-1")
    else:
        execute(recipe, resume=str(again / "checkpoint-1"), quiet=True, force=True)
    resumed = from_file(again / RECORD)
    if resumed.losses != record.losses:
        raise LowresError(f"resumed losses are {resumed.losses}, not {record.losses}")
    same_files(folder / "whole" / MODEL, again / MODEL)


def _resume_elsewhere(recipe: Path, checkpoint: Path) -> None:
    """Resume in a new process, for a lever that changes its process for good."""
    command = [sys.executable, "-m", "lowres", "run", str(recipe), "--resume", str(checkpoint)]
    done = subprocess.run([*command, "--force"], capture_output=True, text=True, env=CLEAN)
    if not (checkpoint.parent / RECORD).exists():
        raise LowresError(
            f"the resumed run ended with code {done.returncode}: {done.stderr[-200:]}"
        )


def same_files(one: Path, other: Path) -> None:
    """Raise LowresError unless both folders hold the same tensors, bit for bit."""
    files = sorted(p.name for p in one.glob("*.safetensors"))
    if not files:
        raise LowresError("nothing was saved")
    for name in files:
        first, second = load_file(one / name), load_file(other / name)
        if first.keys() != second.keys():
            raise LowresError(f"a resumed run saves other tensors in {name}")
        for key, value in first.items():
            if not torch.equal(value, second[key]):
                raise LowresError(f"a resumed run saves another {key}")
