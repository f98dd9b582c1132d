"""`lowres plan`: what a recipe will cost, before a byte is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lowres.cli._page import Page, tell

if TYPE_CHECKING:
    from lowres.core.recipe import Recipe
    from lowres.memory.catalogue import Device

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    name="plan",
    epilog="example: lowres plan recipes/quickstart.yaml --gpu rtx-4060 --no-changes",
)
def command(
    recipes: Annotated[
        Optional[list[Path]], typer.Argument(metavar="[RECIPE]", help="A recipe file.")
    ] = None,
    model: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Plan LoRA for a model instead: hub id, folder with a config.json, or "
            "package:MODULE/PATH. Several models or cards make a table of models by cards by "
            "methods."
        ),
    ] = None,
    task: Annotated[Optional[str], typer.Option(help="With --model: the task.")] = None,
    gpu: Annotated[
        Optional[list[str]],
        typer.Option(metavar="NAME", help="A card, such as rtx-4090, t4 or cpu."),
    ] = None,
    device_gib: Annotated[
        Optional[list[float]], typer.Option(help="Memory of the card, or what it may take of it.")
    ] = None,
    overrides: Annotated[
        Optional[list[str]],
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key. Repeatable."),
    ] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="Compare two recipes by component: --diff A B.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Trace every block instead of extending from a few.")
    ] = False,
    changes: Annotated[
        bool, typer.Option(help="Weigh each lever and smaller setting by itself, too.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    html: Page = None,
) -> None:
    """Predict memory by phase and category, and the time of an update. Needs no GPU or weights.

    Exit 0 also when it does not fit; 1 when the recipe's code cannot be traced, 2 for wrong input.
    """
    from lowres.core.errors import InputError
    from lowres.core.plan import to_json
    from lowres.planning.ladder import ladder
    from lowres.planning.plan import plan

    models, cards, sizes = model or [], gpu or [], device_gib or []
    budgeted = len(cards) == len(sizes) == 1  # so much of that card, and not two cards
    if budgeted and len(models) > 1:
        text = "--gpu and --device-gib are a card and a size of it for one model; give several one"
        raise InputError("the command", [text])
    if models and (len(models) > 1 or (len(cards) + len(sizes) > 1 and not budgeted)):
        _stop_at({"a recipe": recipes, "--task": task, "--exact": exact, "--diff": diff}, "a table")
        _matrix(models, cards, sizes, overrides or [], as_json, html)
        return
    if len(cards) > 1 or len(sizes) > 1:
        raise InputError("the command", ["several cards go with --model; a recipe takes one"])
    if diff:
        _stop_at({"--html": html}, "--diff")
    gib = sizes[0] if sizes else None
    read = _read(recipes or [], models, task, overrides or [], gib, 2 if diff else 1)
    device = _device(cards[0] if cards else None, gib)
    if device is not None and device.kind == "cpu" and gib is not None:
        text = "--device-gib is of a card; a CPU takes --set budget.host_gib=N"
        raise InputError("the command", [text])
    plans = [plan(recipe, device, exact=exact) for recipe in read]
    if diff:
        from lowres.report.plan_table import print_difference

        assert recipes is not None
        if as_json:
            typer.echo("[\n" + ",\n".join(to_json(p).rstrip() for p in plans) + "\n]")
        else:
            print_difference(plans[0], plans[1], (recipes[0].stem, recipes[1].stem))
        return
    from lowres.report.plan_table import LADDER, print_changes, print_plan

    (found,) = plans
    if not as_json:
        print_plan(found)  # The answer first: each change takes a rehearsal of its own.
    if changes:
        found.changes = ladder(read[0], device, found)
    if html is not None:
        from lowres.report.plan_page import write_plan_page

        write_plan_page(found, html)
    if as_json:
        typer.echo(to_json(found))
    else:
        print_changes(found.changes, LADDER)
    tell("page", html, as_json=as_json)


def _stop_at(given: dict[str, object], beside: str) -> None:
    """Refuse options that would go unheard."""
    from lowres.core.errors import InputError

    unheard = [name for name, value in given.items() if value]
    if unheard:
        raise InputError("the command", [f"{beside} does not go with {', '.join(unheard)}"])


def _read(
    paths: list[Path],
    models: list[str],
    task: str | None,
    overrides: list[str],
    device_gib: float | None,
    wanted: int,
) -> list[Recipe]:
    from lowres.core.errors import InputError
    from lowres.core.reading import load_recipe
    from lowres.planning.plan import with_budget
    from lowres.planning.starting import starting_recipe

    if bool(models) == bool(paths) or (models and wanted == 2):
        raise InputError("the command", ["give a recipe file or --model M (two files with --diff)"])
    if models:
        read = [load_recipe(starting_recipe(models[0], task), overrides)]
    elif task is not None:
        raise InputError("--task", ["a recipe names its own; --task goes with --model"])
    elif len(paths) != wanted:
        raise InputError("the command", [f"{len(paths)} recipe files; this wants {wanted}"])
    else:
        read = [load_recipe(path, overrides) for path in paths]
    return [with_budget(recipe, device_gib) for recipe in read]


def _matrix(
    models: list[str],
    gpus: list[str],
    sizes: list[float],
    overrides: list[str],
    as_json: bool,
    html: Path | None,
) -> None:
    from lowres.core.errors import InputError
    from lowres.core.plan import matrix_to_json
    from lowres.memory import device
    from lowres.planning.matrix import matrix
    from lowres.report.plan_table import print_matrix

    cards = [device.load(name) for name in gpus] + [device.generic(size) for size in sizes]
    if not cards:
        raise InputError("the command", ["several models want cards: --gpu or --device-gib"])
    found = matrix(models, cards, overrides)
    if html is not None:
        from lowres.report.plan_page import write_plan_page

        write_plan_page(found, html)
    if as_json:
        typer.echo(matrix_to_json(found))
    else:
        print_matrix(found)
    tell("page", html, as_json=as_json)


def _device(gpu: str | None, device_gib: float | None) -> Device | None:
    from lowres.memory import device

    if gpu is not None:
        return device.load(gpu)
    return None if device_gib is None else device.generic(device_gib)
