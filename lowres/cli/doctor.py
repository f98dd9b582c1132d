"""`lowres doctor`: is this machine ready, and what mends what is not."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    name="doctor",
    epilog="example: lowres doctor",
)
def command(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Check packages, devices, memory, disk, compilers, hub and data.

    Exit 1 when a required package is missing or out of its range.
    """
    from lowres.run.diagnosis import diagnose

    checks = diagnose()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(c) for c in checks], indent=1))
    else:
        width = max(len(c.name) for c in checks)
        for c in checks:
            typer.echo(f"{c.status:<7}  {c.name:<{width}}  {c.found}")
            if c.mend:
                typer.echo(f"{'':<7}  {'':<{width}}  -> {c.mend}")
        counts = {s: sum(c.status == s for c in checks) for s in ("ok", "warning", "missing")}
        typer.echo(", ".join(f"{n} {status}" for status, n in counts.items()))
    if any(c.status == "missing" for c in checks):
        raise typer.Exit(1)
