"""`lowres bench`: a suite of recipes into records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowres.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

RECORDS = Path("benchmarks/records")

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    name="bench",
    epilog="example: lowres bench benchmarks/suites/smoke.yaml --records runs/records",
)
def command(
    suite: Annotated[Path, typer.Argument(help="A suite file, or `compatibility` for that table.")],
    records: Annotated[
        Path, typer.Option(help="Where records are kept; the table's place is in lowres/assets.")
    ] = RECORDS,
    scratch: Annotated[Path, typer.Option(help="Scratch folder; it is emptied.")] = Path(
        "runs/bench"
    ),
    only: Annotated[
        str, typer.Option(metavar="PART", help="compatibility: run again what holds this part.")
    ] = "",
) -> None:
    """Run what a suite lacks: a search of equal budget for each recipe, then every seed.

    Records that are there already are kept, so a suite that was cut goes on. `compatibility` tries
    every combination of method, weights, checkpointing and engine, and every pair of levers.
    """
    say = lambda text: typer.echo(text, err=True)
    if str(suite) == "compatibility":
        if records != RECORDS:
            text = "the table is kept in lowres/assets/compatibility; leave --records out"
            raise InputError("--records", [text])
        _compatibility(scratch, only, say)
        return
    if only:
        raise InputError("--only", ["it goes with `lowres bench compatibility`; leave it out"])
    from lowres.bench import suite as suite_module
    from lowres.report.table import print_comparison

    loaded = suite_module.load(suite)
    print_comparison(suite_module.run(loaded, records, scratch, say))


def _compatibility(scratch: Path, only: str, say: Callable[[str], None]) -> None:
    from collections import Counter

    from lowres.bench import compatibility
    from lowres.core.compatibility import Table

    table, every = Table.read(), compatibility.combinations()
    keys = {one.key for one in every}
    table.cells = {key: cell for key, cell in table.cells.items() if key in keys}
    if only:
        wanted = compatibility.holding(only, every)
    else:
        wanted = [one for one in every if one.key not in table.cells]
    say(f"{len(wanted)} of {len(every)} combinations to run")
    if wanted:
        table.environment = compatibility.surroundings()
    compatibility.fill(table, wanted, scratch / "compatibility", say, table.write)
    table.write()
    counted = Counter(cell.outcome for cell in table.cells.values())
    typer.echo(", ".join(f"{count} {outcome}" for outcome, count in sorted(counted.items())))
