"""`lowres check`: is a recipe right? Reads no weights and imports no torch."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    name="check",
    epilog="example: lowres check recipes/quickstart.yaml",
)
def command(
    recipes: Annotated[list[Path], typer.Argument(help="Recipe files.")],
    overrides: Annotated[
        Optional[list[str]],
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key. Repeatable."),
    ] = None,
) -> None:
    """Check recipes and show every problem of each. Exit 2 when there is one."""
    from lowres.core.compatibility import Table, told
    from lowres.core.errors import InputError, PartsRefuse
    from lowres.core.reading import load_recipe
    from lowres.recommend.nearest import nearest

    wrong, table = False, Table.read()
    for path in recipes:
        try:
            recipe = load_recipe(path, overrides or [])
        except InputError as error:
            typer.echo(f"lowres: {error}", err=True)
            # Another part is no mend of a slip of spelling or type: it would only hide it.
            refused = isinstance(error, PartsRefuse)
            for change in nearest(path, overrides or [], table) if refused else ():
                typer.echo(f"  nearest that works: --set {shlex.quote(change)}", err=True)
            wrong = True
        else:
            typer.echo(f"{path}: ok (digest {recipe.digest}); {told(recipe, table)}")
    if wrong:
        raise typer.Exit(2)
