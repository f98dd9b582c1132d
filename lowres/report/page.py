"""Records as one self-contained HTML page: no script, no request, readable offline and on paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lowres.core import paths
from lowres.core.errors import InputError
from lowres.core.record import RunRecord
from lowres.core.units import format_bytes, format_count, format_seconds
from lowres.report import plots
from lowres.report.table import comparison, main_scores, part_name, planned_bytes

if TYPE_CHECKING:
    import jinja2

TEMPLATE = "page.html.j2"


def write_page(records: Sequence[RunRecord], path: Path) -> None:
    """Write the page of one record, or of several with a comparison before them.

    Args:
        records: At least one, in the order of the page.
        path: Ends in `.html`; a page that is there already is replaced.

    Raises:
        InputError: When the path is no page's name or cannot be written.
    """
    write_html(render(records), path)


def stop_if_no_page(path: Path) -> None:
    """Look at a page's place before it is made; raises as `write_page`."""
    if path.suffix.lower() not in (".html", ".htm"):
        # A slip such as `--html record.json` must not cost the record.
        raise InputError(f"'{path}'", ["is not the name of a page; let it end in .html"])
    paths.stop_if_unwritable(path)


def write_html(text: str, path: Path) -> None:
    """Write a page under a page's name alone; raises as `write_page`."""
    stop_if_no_page(path)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"'{path}'", [f"cannot be written: {error.strerror}"]) from None


def render(records: Sequence[RunRecord]) -> str:
    """The page as text. Equal records give equal text: it holds no date and no path of its own."""
    import lowres

    assert records, "a page needs a record"
    header, rows = comparison(records) if len(records) > 1 else ([], [])
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            version=lowres.__version__,
            colours=plots.COLOURS,
            kinds=plots.MEMORY_KINDS,
            header=header,
            rows=rows,
            scatters=_scatters(records),
            sections=[_section(r, f"record-{i}") for i, r in enumerate(records, start=1)],
        )
    )


def environment() -> jinja2.Environment:
    """What renders the templates of this folder: text is escaped, None is a dash."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: "-" if value is None else value,
    )
    made.filters |= {
        "size": format_bytes,
        "duration": format_seconds,
        "count": lambda n: "-" if n is None else format_count(n),
        "score": lambda x: "-" if x is None else f"{x:.4f}",
        "words": lambda name: str(name).replace("_", " "),
        "yaml": lambda value: yaml.safe_dump(value, sort_keys=False, allow_unicode=True),
    }
    return made


def _section(record: RunRecord, anchor: str) -> dict[str, Any]:
    """What the template shows of one record beyond the record itself."""
    levers = record.recipe.get("levers") or []
    model = record.recipe.get("model") or {}
    figures = {
        "Loss": plots.loss_curve(record, f"{anchor}-loss"),
        "Scores by update": plots.scores_by_step(record, f"{anchor}-scores"),
    }
    return {
        "anchor": anchor,
        "planned": {phase: planned_bytes(record, phase) for phase in record.measured.phases},
        "record": record,
        "checkpoint": model.get("checkpoint") if isinstance(model, dict) else model,
        "part": {f: part_name(record, f) for f in _TOLD},
        "levers": [x.get("name") if isinstance(x, dict) else x for x in levers],
        "main": {(s.split, s.metric) for s in main_scores(record)},
        "figures": _safe({name: svg for name, svg in figures.items() if svg is not None}),
        "memory": _safe({"": plots.memory_bars(record, f"{anchor}-memory") or ""})[""],
        "environment": _environment(record.environment),
    }


_TOLD = ("task", "method", "freezing", "objective", "optimizer", "procedure")


def _safe(figures: dict[str, str]) -> dict[str, Any]:
    """Mark figures as HTML; matplotlib has escaped the text inside them, `plots` their labels."""
    from markupsafe import Markup

    return {name: Markup(svg) for name, svg in figures.items()}


def _environment(environment: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Name and value of everything about the place; sizes in units, versions last."""
    rows: list[tuple[str, str | None]] = []
    for name, value in environment.items():
        if name == "versions":
            continue
        if name.endswith("_bytes") and isinstance(value, int):
            value = format_bytes(value)
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        rows.append((name.replace("_", " "), None if value is None else str(value)))
    versions = environment.get("versions") or {}
    return rows + [(str(name), version) for name, version in versions.items()]


def _scatters(records: Sequence[RunRecord]) -> dict[str, Any]:
    """A figure for each task, split and main metric that two or more runs which went well have."""
    groups: dict[tuple[str, str, str], list[plots.Point]] = {}
    for number, r in enumerate(records, start=1):
        live_bytes = r.measured.peak_live_bytes
        if r.outcome != "ok" or live_bytes is None:
            continue
        for s in main_scores(r):
            group = groups.setdefault((part_name(r, "task"), s.split, s.metric), [])
            group.append(plots.Point(number, live_bytes, s))
    return _safe({
        f"{task}: {metric} on {split}": plots.scatter(points, f"scatter-{i}")
        for i, ((task, split, metric), points) in enumerate(groups.items())
        if len(points) > 1
    })  # fmt: skip
