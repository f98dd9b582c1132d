"""`lowres schema`: the JSON schema of a recipe, for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    name="schema",
    epilog="example: lowres schema --output recipes/schema.json",
)
def command(
    output: Annotated[
        Optional[Path], typer.Option(help="File to write; standard output by default.")
    ] = None,
) -> None:
    """Print the JSON schema of a recipe. Point your editor's YAML plug-in at it."""
    from lowres.core.paths import stop_if_unwritable
    from lowres.core.schema import json_schema

    if output is not None:
        stop_if_unwritable(output)
    text = json.dumps(json_schema(), indent=1) + "\n"
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")
