"""Run every combination of method, weights, checkpointing and engine, and every pair of levers.

Each combination is a process of its own, forked from one that has the libraries loaded: a crash is
a result, and nothing is left over for the next one.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lowres.core import registry
from lowres.core.compatibility import PAIRED_WITH, Cell, Combination, Table
from lowres.core.errors import InputError, LowresError
from lowres.core.parts import Lever
from lowres.core.reading import load_recipe
from lowres.core.recipe import Recipe
from lowres.run import environment

RECOMPUTING: tuple[tuple[str, ...], ...] = ((), ("gradient_checkpointing",))
SECONDS = 180
"""That a combination may take before it counts as hanging."""
SIZES = {"train_examples": 16, "eval_examples": 4}
MODELS = ("package:lowres/assets/tiny_lm", "biased")
"""The embedded Llama; where a method finds nothing to train in it, an OPT with random weights."""


def forms() -> dict[str, dict[str, Any]]:
    """Levers as they stand in a recipe, by what the table calls them: name and fields."""
    found: dict[str, dict[str, Any]] = {}
    for name in registry.names("lever"):
        lever: Any = registry.load("lever", name)
        found[name] = {"name": name, **lever.sample_fields}
        found |= {form: {"name": name, **fields} for form, fields in lever.forms.items()}
    return found


def kinds() -> tuple[list[str], list[str], list[str]]:
    """The levers by what they change: how weights are loaded, how updates are made, the rest."""
    levers = forms()
    weights = [n for n in levers if _overrides(n, "on_load") and _is_lossy(n)]
    engines = [n for n in levers if n not in weights
               and _overrides(n, "on_engine", "on_optimizer", "on_accelerator")]  # fmt: skip
    rest = [n for n in levers if n not in (*weights, *engines, *RECOMPUTING[1])]
    return weights, engines, rest


def combinations() -> list[Combination]:
    """What the table holds: no cell of it may be blank."""
    weights, engines, others = kinds()
    made: dict[str, Combination] = {}
    for method in registry.names("method"):
        whole = itertools.product(
            [(), *((n,) for n in weights)], RECOMPUTING, [(), *((n,) for n in engines)]
        )
        for levers in [*map(_joined, whole), *((name,) for name in others)]:
            one = Combination(method, levers)
            made.setdefault(one.key, one)
    told = forms()
    for pair in itertools.permutations(told, 2):
        if told[pair[0]]["name"] == told[pair[1]]["name"]:
            continue
        one = Combination(PAIRED_WITH, pair)
        made.setdefault(one.key, one)
    return list(made.values())


def holding(part: str, every: Sequence[Combination]) -> list[Combination]:
    """Those with a method or lever.

    Raises:
        InputError: Where none has it.
    """
    levers = forms()
    found = [one for one in every
             if part in (one.method, *(levers[form]["name"] for form in one.levers))]  # fmt: skip
    if not found:
        known = {part for one in every for part in (one.method, *one.levers)}
        raise InputError(
            "--only", [f"no combination holds '{part}'{registry.did_you_mean(part, known)}"]
        )
    return found


def _joined(parts: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(itertools.chain.from_iterable(parts))


def _is_lossy(name: str) -> bool:
    """What is, and asks for it at loading, holds the weights in another form."""
    cls: Any = registry.load("lever", forms()[name]["name"])
    return bool(cls.effect == "lossy")


def _overrides(name: str, *hooks: str) -> bool:
    cls = registry.load("lever", forms()[name]["name"])
    return any(getattr(cls, h, None) is not getattr(Lever, h, None) for h in hooks)


def fill(
    table: Table,
    wanted: Sequence[Combination],
    scratch: Path,
    say: Callable[[str], None],
    done: Callable[[], None],
    workers: int = 2,
) -> None:
    """Run the combinations into the table.

    Args:
        scratch: Folder for the runs; emptied.
        say: Takes a line for each combination.
        done: Called after each, to keep what is there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lowres.bench.compatibility_cell"])
    waiting = list(wanted)
    running: dict[Any, tuple[Combination, Path, Any, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            one = waiting.pop(0)
            folder = scratch.resolve() / f"cell-{len(waiting)}"  # a cell changes to it
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_cell, args=(one, folder, theirs))
            process.start()
            theirs.close()
            running[process.sentinel] = (one, folder, process, ours, time.monotonic())
        ready = multiprocessing.connection.wait(running, timeout=1.0)
        late = [s for s, r in running.items() if time.monotonic() - r[-1] > SECONDS]
        for sentinel in {*ready, *late}:
            one, folder, process, ours, started = running.pop(sentinel)
            if sentinel not in ready:
                process.kill()
            process.join()
            with contextlib.suppress(ProcessLookupError):  # what it has forked
                os.killpg(process.pid, signal.SIGKILL)
            cell = _result(ours, process.exitcode, time.monotonic() - started)
            table.cells[one.key] = cell
            shutil.rmtree(folder, ignore_errors=True)
            say(f"{one.key}: {cell.outcome}{f' ({cell.reason})' if cell.reason else ''}")
            done()


def _result(ours: Any, code: int | None, seconds: float) -> Cell:
    with contextlib.suppress(EOFError):
        if ours.poll():
            cell: Cell = ours.recv()
            return cell
    why = "it hangs" if seconds > SECONDS else f"the process ended with code {code}"
    return Cell("fails", why, MODELS[0], seconds)


def _cell(one: Combination, folder: Path, told: Any) -> None:
    os.setsid()
    os.chdir(folder)
    started = time.monotonic()
    for number, model in enumerate(MODELS):
        own = folder / str(number)
        own.mkdir()
        cell, elsewhere = _apart(one, model, own)
        if not elsewhere:
            break
    cell.reason = " ".join(cell.reason.split())[:300]
    cell.seconds = round(time.monotonic() - started, 1)
    told.send(cell)


def _apart(one: Combination, model: str, folder: Path) -> tuple[Cell, bool]:
    """`_tried` in a process of its own: a group of processes that the first model's run made would
    be the second one's too."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        from lowres.bench.compatibility_cell import one_thread

        one_thread()
        theirs.send(_tried(one, model, folder))

    process = context.Process(target=work)
    process.start()
    theirs.close()
    with contextlib.suppress(EOFError):
        answer: tuple[Cell, bool] = ours.recv()
        return answer
    process.join()
    return Cell("fails", f"the process ended with code {process.exitcode}", model, 0.0), False


def _tried(one: Combination, model: str, folder: Path) -> tuple[Cell, bool]:
    """What became of it on this model, and whether the other may have what the method trains."""
    from lowres.bench.compatibility_cell import try_out

    cell = Cell("works", "", model, 0.0)
    try:
        try_out(_recipe(one, model, folder), folder)
    except InputError as error:
        cell.outcome, cell.reason = "refused", error.problems[0].text
        return cell, error.problems[0].where == "method"
    except LowresError as error:
        cell.outcome, cell.reason = "fails", str(error)
    except Exception as error:
        cell.outcome, cell.reason = "fails", f"{type(error).__name__}: {error}"
    return cell, False


def _recipe(one: Combination, model: str, folder: Path) -> Recipe:
    """Labelled rows; where they are refused, and only there, a text."""
    asked = raw(one, model, folder)
    try:
        return load_recipe(asked)
    except InputError as error:
        text = {"name": "text", "files": [], "valid_files": []}
        for key, first in (("files", 0), ("valid_files", 100)):
            file = folder / f"{key}.txt"
            # Documents of five numbers; three line ends part them.
            numbers = [range(n, n + 5) for n in range(first, first + 100, 5)]
            file.write_text("\n\n\n".join(" ".join(map(str, five)) for five in numbers), "utf-8")
            text[key] = [str(file)]
        with contextlib.suppress(InputError):
            return load_recipe(asked | {"task": text | SIZES, "objective": "next_token"})
        raise error


def raw(one: Combination, model: str, folder: Path) -> dict[str, Any]:
    """Keys of the recipe that a combination is tried with: two updates of one micro-batch."""
    method: Any = registry.load("method", one.method)
    levers: list[dict[str, Any]] = []
    needed: dict[str, Any] = {}
    for name in one.levers:
        levers.append(forms()[name])
        lever: Any = registry.load("lever", levers[-1]["name"])
        # The loop below is what all of them can work with.
        needed |= {key: told for key, told in lever.sample_recipe.items() if key != "loop"}
    if model == "biased":
        from lowres.bench.compatibility_cell import biased

        model = str(biased(folder / "biased"))
    return {
        "model": {"checkpoint": model},
        "task": {"name": "grammaticality", **SIZES},
        "method": {"name": one.method, **method.sample_fields},
        "objective": "label_words",
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "levers": levers,
        "loop": {
            "steps": 2, "micro_batch_size": 2, "global_batch_size": 2, "max_length": 32,
            "save_every": 1, "keep_checkpoints": 2, "max_grad_norm": None,
        },
        **needed,
    }  # fmt: skip


def surroundings() -> dict[str, Any]:
    """What stands above the table."""
    return {
        "device": "cpu",
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        **environment.commit(),
        "versions": environment.versions(),
    }
