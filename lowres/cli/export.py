"""`lowres export`: what a run trained, folded into a plain model that needs no PEFT."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    name="export",
    epilog="example: lowres export runs/try --output merged",
)
def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The output folder of a run.")],
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where to; a folder that is empty or not there.")
    ],
    overrides: Annotated[
        Optional[list[str]],
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a key, such as model.dtype. Repeatable."
        ),
    ] = None,
    same_base: Annotated[
        bool,
        typer.Option(
            "--same-base", help="Take the recipe's base for the adapter's own, whatever is known."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Merge a run's adapter into its base, loaded again without quantisation, in model.dtype.

    The result is compared with the adapter beside that base on four training rows before it is
    written. A checkpoint or data that the recipe names by a relative path are looked for from here,
    as by the run. Exit 1 when it answers otherwise, as the plain base does, or cannot be written;
    2 when there is nothing to merge or the base is another.
    """
    from rich.console import Console

    from lowres.core.errors import InputError
    from lowres.core.reading import load_recipe
    from lowres.run.merging import merge
    from lowres.run.output import MODEL, RECIPE

    if not (run / RECIPE).is_file():
        raise InputError(f"'{run}'", [f"holds no {RECIPE}; give the output folder of a run"])
    recipe = load_recipe(run / RECIPE, overrides or [])
    with Console(stderr=True).status("merging"):  # seen in a terminal alone
        try:
            done = merge(recipe, run / MODEL, output, same_base=same_base)
        except InputError as error:
            raise recipe.located(error) from error
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done) | {"folder": str(done.folder)}, indent=1))
        return
    typer.echo(f"merged: {done.folder} ({done.dtype})")
    typer.echo(
        f"logits, as shares of their norm: {done.distance:.2g} from the adapter beside that base, "
        f"{done.from_trained:.2g} from the model as it was trained; the adapter moves the base by "
        f"{done.effect:.2g}"
    )
