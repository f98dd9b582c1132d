"""`lowres list`: what there is to choose from, one line a part. Imports no torch."""

from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from lowres.core import registry

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    name="list",
    epilog="example: lowres list methods",
)
def command(
    family: Annotated[
        Optional[str],
        typer.Argument(help="tasks, methods, freezing, objectives, ...; all when left out"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List the parts of one family, or of all, with what each does; methods by their class."""
    families = [registry.family(family)] if family else list(registry.FAMILIES)
    found = {
        f: {n: registry.docstring(f, n).partition("\n")[0] for n in registry.names(f)}
        for f in families
    }
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for f, parts in found.items():
        typer.echo(registry.FAMILIES[f])
        width = max((len(n) for n in parts), default=0)
        for group, names in _groups(f, list(parts)).items():
            if group:
                typer.echo(f"  {group}")
            indent = "    " if group else "  "
            for name in names:
                typer.echo(f"{indent}{name:<{width}}  {parts[name]}")


def _groups(family: str, names: list[str]) -> dict[str, list[str]]:
    """Names by what a family's members say of their class; all under one where they say nothing."""
    found: dict[str, list[str]] = {}
    for name in names:
        told = registry.constant(family, name, "taxonomy")
        found.setdefault(told or "", []).append(name)
    return dict(sorted(found.items()))
