"""One combination tried out: train, save, load, merge, resume, and see that the same came out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from lowres.bridges import peft, quiet, tiny, transformers
from lowres.bridges.blocks import map_blocks
from lowres.core.errors import LowresError
from lowres.core.example import Batch, collate
from lowres.core.learner import Learner, LoadRequest
from lowres.core.parts import fold
from lowres.core.recipe import Recipe
from lowres.core.record import from_file
from lowres.making import build
from lowres.run import merging
from lowres.run.execute import execute
from lowres.run.output import MODEL, RECORD

BIASED_LIKE = "package:lowres/assets/tiny_lm"

# Loaded where the processes of all combinations are forked from.
peft.preload()


def biased(folder: Path) -> Path:
    """A model with biases: what some methods train."""
    with quiet.transformers():
        return tiny.write_opt(folder, BIASED_LIKE)


def one_thread() -> None:
    """What a forked process begins with.

    torch throws away the pool of threads of before the fork when their number is set next, and
    takes no lock: where threads that load weights are the first to do so, one of them may find no
    pool ("Invalid thread pool!", ParallelOpenMP.cpp).
    """
    torch.set_num_threads(1)


def try_out(recipe: Recipe, folder: Path) -> None:
    """Two updates and a save; what was saved loaded and merged; the second update again from the
    checkpoint of the first.

    Raises:
        InputError: Where lowres refuses the recipe.
        LowresError: Where what came out is not the same.
    """
    alone = any(lever.whole_process for lever in recipe.levers)
    again = folder / "again"
    again.mkdir()
    resume: Callable[[], None] = functools.partial(_resume, recipe, again)
    # For a lever that changes its process for good: forked before it has.
    resume = _later(resume) if alone else resume
    inputs = build.read(recipe)
    # As rows are asked of a model that is used: no lever has laid them out.
    batch = collate(inputs.data.train[: merging.ROWS], inputs.encoder.pad_id)
    trained: list[torch.Tensor] = []
    record = execute(
        recipe, output_folder=folder / "whole", quiet=True, plan=False,
        look=lambda learner: trained.append(merging.logits_of(learner, batch)),
    )  # fmt: skip
    same_answers(recipe, inputs, folder / "whole" / MODEL, batch, trained[0])

    shutil.copytree(folder / "whole" / "checkpoint-1", again / "checkpoint-1")
    resume()
    resumed = from_file(again / RECORD)
    if resumed.losses != record.losses:
        raise LowresError(f"resumed losses are {resumed.losses}, not {record.losses}")
    same_files(folder / "whole" / MODEL, again / MODEL)


def same_answers(
    recipe: Recipe, inputs: build.Inputs, saved: Path, batch: Batch, trained: torch.Tensor
) -> None:
    """Load what was saved with transformers and PEFT alone, merge it, and load that.

    What is loaded answers bit for bit as what was trained: its weights are packed from the same
    bytes. What is merged answers as the adapter beside the base without levers, within
    `merging.TOLERANCE`.

    Args:
        saved: An adapter, to be put beside its base, or a whole model, which is merged already.
        trained: Logits of the trained model for the batch.

    Raises:
        LowresError: Where one of the two answers otherwise.
    """
    plain = build.request_of(recipe, inputs)
    request = fold(plain, recipe.levers, "on_load")
    adapter = (saved / "adapter_config.json").is_file()
    if adapter:
        loaded = merging.adapted(recipe, inputs, request, saved)
    else:
        loaded = _whole(inputs, request, saved)
    answers = merging.logits_of(loaded, batch)
    if not torch.equal(answers, trained):
        # Levers on the modules may change which rows share a product, by which 8 bits round.
        answers = merging.logits_of(fold(loaded, recipe.levers, "on_learner"), batch)
    off = merging.distance_of(answers, trained)
    # What is not saved as it was trained (parts without effect are left out) is rounded otherwise.
    exact = "saved" not in recipe.method.waives
    if not (torch.equal(answers, trained) if exact else off <= merging.TOLERANCE[plain.dtype]):
        raise LowresError(f"the saved model, loaded again, answers otherwise: off by {off:.2g}")
    if not (adapter and recipe.method.mergeable):
        return
    if request != plain:
        answers = merging.logits_of(merging.adapted(recipe, inputs, plain, saved), batch)
    into = saved.parent / "merged"
    merging.merge(recipe, saved, into)
    off = merging.distance_of(merging.logits_of(_whole(inputs, plain, into), batch), answers)
    if not off <= merging.TOLERANCE[plain.dtype]:
        raise LowresError(f"the merged model, loaded again, answers otherwise: off by {off:.2g}")


def _whole(inputs: build.Inputs, request: LoadRequest, folder: Path) -> Learner:
    """A model as its folder describes it, without a recipe's knowledge."""
    config = transformers.load_config(str(folder), None, False)
    request = dataclasses.replace(request, checkpoint=str(folder), revision=None, init="pretrained")
    model, _ = transformers.load_model(request, config, inputs.encoder.pad_id, 0)
    blocks = map_blocks(model)
    return Learner(model, model, inputs.tokenizer, inputs.kind, inputs.head, blocks)


def _resume(recipe: Recipe, folder: Path) -> None:
    execute(recipe, resume=str(folder / "checkpoint-1"), quiet=True, plan=False)


def _later(work: Callable[[], None]) -> Callable[[], None]:
    """What does the work when it is called, in a process that is there from now on.

    Raises:
        LowresError: From the call, when the process does not end well.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def wait() -> None:
        ours.close()
        with contextlib.suppress(EOFError):
            theirs.recv()
            try:
                one_thread()
                work()
                theirs.send("")
            except Exception as error:
                theirs.send(f"{type(error).__name__}: {error}")

    process = context.Process(target=wait, daemon=True)
    process.start()
    theirs.close()

    def call() -> None:
        ours.send(None)
        try:
            told = ours.recv()
        except EOFError:
            process.join()
            told = f"its process ended with code {process.exitcode}"
        if told:
            raise LowresError(f"the resumed run: {told}")

    return call


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
