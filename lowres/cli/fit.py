"""`lowres fit`: the best recipe for a card, written to a file that `lowres run` takes."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from lowres.cli._page import Page, tell
from lowres.cli._records import read

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Goal(enum.StrEnum):
    """What is best."""

    quality = "quality"
    speed = "speed"
    context = "context"


@app.command(
    name="fit",
    epilog="example: lowres fit --model package:lowres/assets/tiny_lm --task grammaticality "
    "--device-gib 1 --output runs/fit.yaml",
)
def command(
    model: Annotated[
        str, typer.Option(help="Hub id, folder with a config.json, or package:MODULE/PATH.")
    ],
    task: Annotated[Optional[str], typer.Option(help="Of `lowres list tasks`.")] = None,
    gpu: Annotated[Optional[str], typer.Option(metavar="NAME", help="A card, by name.")] = None,
    device_gib: Annotated[
        Optional[float], typer.Option(help="Memory of the card, or what it may take of it.")
    ] = None,
    host_gib: Annotated[
        Optional[float], typer.Option(help="Resident memory that the process may take.")
    ] = None,
    minutes: Annotated[
        Optional[float],
        typer.Option(help="Planned training time at most; also the recipe's time budget."),
    ] = None,
    objective: Annotated[
        Goal,
        typer.Option(help="quality: fewest approximations; speed: tokens/s; context: long rows."),
    ] = Goal.quality,
    records: Annotated[
        Optional[list[Path]],
        typer.Option(metavar="DIR", help="Records that tell qualities. Repeatable."),
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="Where the recipe goes, over an earlier one; fit.yaml."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    html: Page = None,
) -> None:
    """Search method, levers, optimizer, freezing, rows and length for a card.

    Exit 3 when nothing fits, with what would.
    """
    from lowres.core.errors import InputError
    from lowres.core.plan import fit_to_json
    from lowres.memory import device as devices
    from lowres.recommend.fit import fit

    place = output or Path("fit.yaml")
    _stop_if_taken(place)
    if gpu is None and device_gib is None:
        device = devices.present()
        if device is None:
            raise InputError("the command", ["no card here; give --gpu NAME or --device-gib N"])
    else:
        device = devices.load(gpu) if gpu is not None else devices.generic(device_gib or 0.0)
    found = fit(
        model, task, device, device_gib=device_gib, host_gib=host_gib, minutes=minutes,
        goal=objective.value, evidence=read(records or []),
    )  # fmt: skip
    if found.recipe is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(found.recipe, encoding="utf-8")
    if html is not None:
        from lowres.report.plan_page import write_plan_page

        write_plan_page(found, html)
    if as_json:
        typer.echo(fit_to_json(found))
    else:
        from lowres.report.plan_table import print_fit

        print_fit(found)
    tell("recipe", None if found.recipe is None else place, as_json=as_json)
    tell("page", html, as_json=as_json)
    if found.recipe is None:
        raise typer.Exit(3)


def _stop_if_taken(place: Path) -> None:
    """Refuse a place that cannot be written, or where a file lies that `fit` did not write."""
    from lowres.core.errors import InputError
    from lowres.core.paths import stop_if_unwritable
    from lowres.recommend.fit import CHOSEN

    stop_if_unwritable(place, makes_folders=True)
    if not place.is_file():  # new, or a device such as /dev/stdout
        return
    with place.open(encoding="utf-8", errors="replace") as file:
        first = file.readline().rstrip()
    if not (first.startswith("#") and first.endswith(CHOSEN)):
        text = "it is there, and not by `lowres fit`; --output FILE names another, or move it away"
        raise InputError(f"'{place}'", [text])
