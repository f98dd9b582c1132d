"""Rows from files: tab-separated tables, JSON lines, plain text;
gzip and xz are read as they are.
"""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

from lowres.core import paths
from lowres.core.errors import InputError, some

SHOWN = 5
"""Broken rows named one by one; of the rest the message says how many."""
_UTF8 = "utf-8-sig"  # with the mark that some spreadsheets put first, or without


def open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return cast("IO[str]", gzip.open(path, "rt", encoding=_UTF8))
    if path.suffix == ".xz":
        return cast("IO[str]", lzma.open(path, "rt", encoding=_UTF8))
    return path.open(encoding=_UTF8)


def folder_of(task: str, folder: str | None) -> Path | None:
    """The task's folder: as given, else of that name under the data folder; None to use the hub.

    Raises:
        InputError: When a folder was given and is not there.
    """
    if folder is None:
        there = paths.data_folder() / task
        return there if there.is_dir() else None
    found = paths.find(folder)
    if found is None or not found.is_dir():
        raise InputError("the recipe", [f"`task.folder`: there is no folder '{folder}'"])
    return found


def table(folder: Path, stem: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of `<stem>.tsv`, `.tsv.gz`, `.jsonl` or `.jsonl.gz`, each with the columns asked for.

    Tables have a header line and no quoting; a tab or line end never stands inside a cell.

    Raises:
        InputError: When the file is not there, a column is missing, or rows are broken (with line
            numbers).
    """
    candidates = [
        folder / f"{stem}{kind}{pack}" for kind in (".tsv", ".jsonl") for pack in ("", ".gz")
    ]
    path = next((c for c in candidates if c.is_file()), None)
    if path is None:
        raise InputError(
            f"'{folder}'",
            [
                f"holds no {stem}.tsv or {stem}.jsonl (.gz may follow); was it the right one? "
                "task.evaluate names the splits that are scored"
            ],
        )
    try:
        with open_text(path) as lines:
            rows = list(_json_rows(lines) if ".jsonl" in path.name else _tab_rows(lines))
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"'{path}'", [f"cannot be read: {error}"]) from error
    _stop_if_other_columns(path, [row for _, row in rows if isinstance(row, dict)], columns)
    broken = []
    good = []
    for number, row in rows:
        if isinstance(row, str):
            broken.append(f"line {number}: {row}")
            continue
        missing = [c for c in columns if not isinstance(row.get(c), str | int)]
        if missing:
            broken.append(f"line {number}: it has no {', '.join(missing)}")
        else:
            good.append({c: str(row[c]) for c in columns})
    stop_if_broken(path, broken)
    yield from good


def _stop_if_other_columns(
    path: Path, rows: Sequence[dict[str, str]], columns: Sequence[str]
) -> None:
    """Raise InputError where a column is in no row at all: the names are other ones."""
    there = list(dict.fromkeys(name for row in rows for name in row))
    if not rows or set(columns) <= set(there):
        return
    what, fix = "columns", "name them so in the first line, separated by tabs"
    if ".jsonl" in path.name:
        what, fix = "keys", "name them so in each line"
    text = f"it has {what} {some(there)}; wants {', '.join(columns)}; {fix}"
    raise InputError(f"'{path}'", [text])


def stop_if_broken(path: Path, broken: Sequence[str]) -> None:
    """Raise InputError over broken rows, the first few by line."""
    if broken:
        more = len(broken) - SHOWN
        tail = [f"and {more} more broken row(s)"] if more > 0 else []
        raise InputError(f"'{path}'", [*broken[:SHOWN], *tail])


def _tab_rows(lines: IO[str]) -> Iterator[tuple[int, dict[str, str] | str]]:
    header = lines.readline().rstrip("\n").split("\t")
    for number, line in enumerate(lines, start=2):
        cells = line.rstrip("\n").split("\t")
        if len(cells) == len(header):
            yield number, dict(zip(header, cells, strict=True))
        else:
            yield number, f"it has {len(cells)} cells, the header {len(header)}"


def _json_rows(lines: IO[str]) -> Iterator[tuple[int, dict[str, str] | str]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, f"it is not JSON: {error.msg}"
            continue
        yield number, row if isinstance(row, dict) else "it is not a JSON object"


def text(name: str) -> str:
    """A whole text file. Raises InputError when it is not there or not UTF-8 text."""
    path = paths.find(name)
    if path is None or not path.is_file():
        raise InputError(
            "the task", [f"there is no file '{name}' (nor under {paths.data_folder()})"]
        )
    try:
        with open_text(path) as file:
            return file.read()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"'{path}'", [f"cannot be read as text: {error}"]) from error
