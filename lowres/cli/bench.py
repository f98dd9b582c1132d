"""`lowres bench`: a suite of recipes into records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    name="bench",
    epilog="example: lowres bench benchmarks/suites/smoke.yaml --records runs/records",
)
def command(
    suite: Annotated[Path, typer.Argument(help="A suite file.")],
    records: Annotated[Path, typer.Option(help="Where records are kept.")] = Path(
        "benchmarks/records"
    ),
    scratch: Annotated[Path, typer.Option(help="Scratch folder; it is emptied.")] = Path(
        "runs/bench"
    ),
) -> None:
    """Run what a suite lacks: a search of equal budget for each recipe, then every seed.

    Records that are there already are kept, so a suite that was cut goes on.
    """
    from lowres.report.table import print_comparison
    from lowres.run import suite as suite_module

    loaded = suite_module.load(suite)
    say = lambda text: typer.echo(text, err=True)
    print_comparison(suite_module.run(loaded, records, scratch, say))
