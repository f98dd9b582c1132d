"""`--html FILE`, alike in each command that writes a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def _checked(html: Path | None) -> Path | None:
    """Looked at before anything is computed: a slip in the name must not cost the answer."""
    if html is not None:
        from lowres.report.page import stop_if_no_page

        stop_if_no_page(html)
    return html


Page = Annotated[
    Optional[Path],
    typer.Option(
        "--html",
        metavar="FILE",
        callback=_checked,
        help="Write one self-contained page; replaces one that is there.",
    ),
]


def tell(name: str, path: Path | None, *, as_json: bool) -> None:
    """Say where a file was written; beside JSON, on the standard error."""
    if path is not None:
        typer.echo(f"{name}: {path}", err=as_json)
