"""`lowres report`: records as a table in the terminal and as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowres.cli._page import Page, tell
from lowres.cli._records import read

if TYPE_CHECKING:
    from lowres.core.record import RunRecord

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    name="report",
    epilog="example: lowres report runs/try --html report.html",
)
def command(
    places: Annotated[
        list[Path],
        typer.Argument(metavar="DIR|RECORD...", help="Records, or folders that hold records."),
    ],
    html: Page = None,
    planner: Annotated[
        bool, typer.Option("--planner", help="How far plans were from what was measured.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the records as a JSON list.")
    ] = False,
) -> None:
    """Show what runs were, took and reached; several are compared. Exit 2 without a record."""
    from lowres.core import record as record_module
    from lowres.core.errors import InputError

    if planner and as_json:
        raise InputError("the command", ["--planner prints a table; --json gives whole records"])
    records = read(places)
    if html is not None:
        from lowres.report.page import write_page

        write_page(records, html)
    if as_json:
        typer.echo("[\n" + ",\n".join(record_module.to_json(r).rstrip() for r in records) + "\n]")
    elif planner:
        from lowres.report.planner import print_errors

        print_errors(records)
    else:
        _print(records)
    tell("page", html, as_json=as_json)


def _print(records: list[RunRecord]) -> None:
    from lowres.report.table import print_comparison, print_record

    if len(records) == 1:
        print_record(records[0])
    else:
        print_comparison(records)
