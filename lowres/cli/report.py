"""`lowres report`: records as a table in the terminal and as one HTML page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowres.cli._page import Page, tell

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
    # A dict keeps order and drops a record that is named twice.
    files = list(dict.fromkeys(f.resolve() for place in places for f in record_files(place)))
    records = [record_module.from_file(f) for f in files]
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


def record_files(place: Path) -> list[Path]:
    """The record files of one argument.

    Raises:
        InputError: When a folder holds none.
    """
    from lowres.core.errors import InputError
    from lowres.run.output import RECORD

    if not os.path.isdir(place):
        return [place]
    if (place / RECORD).is_file():
        return [place / RECORD]
    found = sorted(f for f in place.rglob("*.json") if f.name == RECORD or _is_record(f))
    if not found:
        raise InputError(f"'{place}'", ["holds no run record; `lowres run` writes record.json"])
    return found


def _is_record(file: Path) -> bool:
    """Whether a JSON file of another name is a record: run folders hold other JSON too."""
    from lowres.core.errors import InputError
    from lowres.core.record import from_file

    try:
        from_file(file)
    except InputError:
        return False
    return True


def _print(records: list[RunRecord]) -> None:
    from lowres.report.table import print_comparison, print_record

    if len(records) == 1:
        print_record(records[0])
    else:
        print_comparison(records)
