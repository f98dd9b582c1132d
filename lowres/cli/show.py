"""`lowres show`: one part with its source, fields and defaults."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    name="show",
    epilog="example: lowres show method lora",
)
def command(
    family: Annotated[
        str, typer.Argument(help="task, method, freezing, objective, optimizer, lever, ...")
    ],
    name: Annotated[str, typer.Argument(help="The part's name, as lowres list gives it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show what a part does, where it comes from, and its keys in a recipe."""
    import inspect

    from lowres.core import registry

    family = registry.family(family)
    cls: Any = registry.load(family, name)
    fields = []
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        default = None if required else getattr(f.default, "default", f.default)
        required = required or str(default) == "PydanticUndefined"
        fields.append(
            {"name": f.name, "type": str(f.type), "required": required,
             "default": None if required else default}
        )  # fmt: skip
    text = registry.docstring(family, name)
    if as_json:
        out = {"family": family, "name": name, "about": text, "fields": fields}
        typer.echo(json.dumps(out, indent=1, default=list))
        return
    typer.echo(f"{family} {name}   ({registry.source(family, name).name})\n\n{text}\n")
    typer.echo(inspect.getdoc(cls) or "")
    typer.echo("\nkeys:" if fields else "\nno keys")
    for f_ in fields:
        value = "required" if f_["required"] else f"default {f_['default']!r}"
        typer.echo(f"  {f_['name']}: {f_['type']}   {value}")
