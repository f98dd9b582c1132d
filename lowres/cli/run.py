"""`lowres run`: one recipe from plan to record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    name="run",
    epilog="example: lowres run recipes/quickstart.yaml --set loop.epochs=0.1 --output runs/try",
)
def command(
    recipe: Annotated[Path, typer.Argument(help="A recipe file.")],
    overrides: Annotated[
        Optional[list[str]],
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a key, such as method.rank=4. Repeatable."
        ),
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option(help="Folder for the results; the next runs/<recipe>-<n> by default."),
    ] = None,
    resume: Annotated[
        Optional[str],
        typer.Option(
            metavar="[latest|PATH]",
            help="Go on from the latest checkpoint of this recipe's last run, "
            "or from the one named.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run although the plan says that it does not fit.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan/--no-plan", help="Plan first, or start at once.")
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the record on standard output.")
    ] = False,
) -> None:
    """Train, measure and score a recipe, and write its record.

    The recipe is planned first; where the plan does not fit, nothing is loaded and the exit code
    is 3. Also under accelerate: accelerate launch -m lowres run RECIPE.
    """
    import sys

    import lowres
    from lowres.bridges import accelerate, accelerate_cpu
    from lowres.core import record as record_module
    from lowres.run.execute import execute

    accelerate_cpu.start_missing_processes(sys.argv[1:])
    loaded = lowres.load_recipe(recipe, overrides or [])
    record = execute(loaded, output_folder=output, resume=resume, force=force, plan=plan)
    if not accelerate.is_main():
        return
    from lowres.report import page, table

    assert record.folder is not None

    if as_json:
        typer.echo(record_module.to_json(record))
    else:
        table.print_record(record)
        typer.echo(f"record: {record.folder}/record.json   report: {record.folder}/report.html")
    try:
        page.write_page([record], Path(record.folder) / "report.html")
    except Exception as error:  # The run is done, and `lowres report` makes the page again.
        typer.echo(f"the page could not be written to {record.folder}: {error}", err=True)
