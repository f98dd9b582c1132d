"""`lowres advise`: which method to try first, with the evidence of each line."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lowres.cli._records import read

if TYPE_CHECKING:
    from lowres.core.record import RunRecord
    from lowres.recommend.advice import Advice
    from lowres.recommend.findings import TaskKind

app = typer.Typer(add_completion=False, rich_markup_mode=None)

PLACES = (Path("runs"), Path("benchmarks/records"))
"""Where records are looked for when no folder is named."""


class Kind(enum.StrEnum):
    """What is asked of the model."""

    classification = "classification"
    generation = "generation"


@app.command(
    name="advise",
    epilog="example: lowres advise --model package:lowres/assets/tiny_lm --task-size 1000 "
    "--device-gib 8 --kind generation",
)
def command(
    model: Annotated[
        str, typer.Option(help="Hub id, folder with a config.json, or package:MODULE/PATH.")
    ],
    task_size: Annotated[int, typer.Option(help="Training rows.")],
    device_gib: Annotated[float, typer.Option(help="Memory of the card.")],
    kind: Annotated[
        Optional[Kind], typer.Option(help="Of the task; what suits the model when left out.")
    ] = None,
    records: Annotated[
        Optional[list[Path]],
        typer.Option(metavar="DIR", help="Records to rank by; runs and benchmarks/records "
                     "where they are here. Repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:  # fmt: skip
    """Rank methods by records at hand and by what papers found; say what is not known.

    What fits is planned for one row of at most 512 tokens in bfloat16, for the first of the list;
    of the others it tells the least that they need.
    """
    from lowres.recommend import possible
    from lowres.recommend.advice import advise

    wanted: TaskKind | None = None if kind is None else kind.value
    found = advise(model, task_size, device_gib, wanted, _records(records))
    if as_json:
        from pydantic import RootModel

        from lowres.recommend.advice import Advice

        typer.echo(RootModel[list[Advice]](found).model_dump_json(indent=1))
        return
    ranked = [one for one in found if one.score is not None]
    for number, one in enumerate(ranked, 1):
        _print(number, one)
    rest = ", ".join(one.method + _cannot(one) for one in found if one.score is None)
    typer.echo(f"nothing is known of: {rest or 'none'}")
    typer.echo(
        "a score is the weighted mean place in its comparisons, from 0 to 1; see docs/methods.md"
    )
    typer.echo(
        f"planned: the first {possible.PLANNED} that may fit; 'at least' is without activations"
    )


def _cannot(one: Advice) -> str:
    return " (refused)" if one.refused else " (does not fit)" if one.fits is False else ""


def _records(named: list[Path] | None) -> list[RunRecord]:
    from lowres.core.errors import InputError
    from lowres.core.record import from_file

    if named is not None:
        return read(named)
    out = []
    for file in (f for place in PLACES for f in sorted(place.rglob("*.json"))):
        try:
            out.append(from_file(file))
        except InputError:
            continue  # Folders of runs hold other JSON, too.
    return out


def _print(number: int, one: Advice) -> None:
    from lowres.recommend.advice import DISTANT
    from lowres.recommend.possible import told

    low, high = one.learning_rates
    typer.echo(f"{number}. {one.method}   score {one.score:.2f}; {told(one)}; "
               f"learning rates {low:g} to {high:g}")  # fmt: skip
    near = [e for e in one.evidence if e.weight > DISTANT]
    for e in near:
        link = f" {e.url}" if e.url else ""
        typer.echo(f"   evidence: {e.source}{link}: {e.setting}: {e.says}"
                   + (f"; {e.apart}" if e.apart else ""))  # fmt: skip
    further = dict.fromkeys(f"{e.source} ({e.apart})" for e in one.evidence if e not in near)
    if further:
        typer.echo(f"   for little: {'; '.join(further)}")
    for remark in one.remarks:
        typer.echo(f"   remark: {remark}")
    for gap in one.unknown:
        typer.echo(f"   not known: {gap}")
