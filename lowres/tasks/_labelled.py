"""Labelled examples from a local folder, or from the hub through datasets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lowres.core.errors import InputError
from lowres.core.example import Example
from lowres.core.parts import part
from lowres.tasks import _files
from lowres.tasks._classification import Classification


@dataclass(frozen=True)
class Source:
    """Where one split lies and how its columns are called.

    Args:
        stem: Local file name without its ending.
        text, pair, label: Local columns; `pair` None for single texts.
        spellings: What stands in the label column for each label, by index.
        folder: Another local folder than the task's.
        hub: Data set path, configuration and split on the hub; None when it is not there.
        hub_text, hub_pair: The hub's column names.
        hub_labels: For each class number of the hub, the label's index here.
        hub_rows: Part of the hub's split, from row to row (None: to its end).
    """

    stem: str
    text: str
    label: str
    spellings: tuple[str, ...]
    pair: str | None = None
    folder: str | None = None
    hub: tuple[str, str | None, str] | None = None
    hub_text: str = "sentence"
    hub_pair: str | None = None
    hub_labels: tuple[int, ...] = (0, 1)
    hub_rows: tuple[int, int | None] = (0, None)


@part
class Labelled(Classification):
    """Splits of labelled texts.

    Args:
        folder: Local folder; None takes that of the task's name under the data folder, else the
            hub.
    """

    sources: ClassVar[Mapping[str, Source]]

    folder: str | None = None

    def splits(self) -> tuple[str, ...]:
        """All from a local folder, else those that the hub has."""
        local = _files.folder_of(self.name, self.folder) is not None
        return tuple(name for name, source in self.sources.items() if local or source.hub)

    def examples(self, split: str) -> Sequence[Example]:
        """Raises InputError naming broken rows, labels out of range, or a split without rows."""
        source, folder = self.sources[split], _files.folder_of(self.name, self.folder)
        if folder is None:
            rows = _from_hub(split, source)
            where = Path(source.hub[0]) if source.hub else Path(split)
        else:
            home = folder if source.folder is None else folder.parent / source.folder
            rows, where = _from_folder(split, source, home), home / source.stem
        if not rows:
            raise InputError(f"'{where}'", [f"the split '{split}' has no rows"])
        return rows


def _from_folder(split: str, source: Source, folder: Path) -> Sequence[Example]:
    columns = [c for c in (source.text, source.pair, source.label) if c is not None]
    out, broken = [], []
    for i, row in enumerate(_files.table(folder, source.stem, columns)):
        label = row[source.label]
        if label not in source.spellings:
            broken.append(
                f"row {i + 1}: its label '{label}' is none of {', '.join(source.spellings)}"
            )
            continue
        out.append(
            Example(
                id=f"{split}-{i}",
                text=row[source.text],
                pair=row[source.pair] if source.pair else None,
                label=source.spellings.index(label),
            )
        )
    _files.stop_if_broken(folder / source.stem, broken)
    return out


def _from_hub(split: str, source: Source) -> Sequence[Example]:
    from lowres.bridges import datasets

    if source.hub is None:
        raise InputError(
            "the task",
            [f"the split '{split}' is not on the hub; set `task.folder` to a local copy"],
        )
    path, name, hub_split = source.hub
    out, broken = [], []
    start, stop = source.hub_rows
    for i, row in enumerate(datasets.hub_rows(path, name, hub_split)[start:stop]):
        label = row.get("label")
        if not isinstance(label, int) or not 0 <= label < len(source.hub_labels):
            broken.append(
                f"row {i + 1}: its label {label!r} is not 0..{len(source.hub_labels) - 1}"
            )
            continue
        pair = str(row[source.hub_pair]) if source.hub_pair else None
        out.append(
            Example(f"{split}-{i}", str(row[source.hub_text]), pair, source.hub_labels[label])
        )
    _files.stop_if_broken(Path(path), broken)
    return out
