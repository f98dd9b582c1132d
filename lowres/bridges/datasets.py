"""The only door to datasets: a split of a hub data set as plain rows."""

from __future__ import annotations

import os
from typing import Any

from lowres.core.errors import InputError


def hub_rows(path: str, name: str | None, split: str) -> list[dict[str, Any]]:
    """The rows of one split, from the hub or its local cache.

    Raises:
        InputError: When it cannot be had, with the way to give a local folder instead.
    """
    import datasets

    try:
        rows = datasets.load_dataset(path, name, split=split)
    except Exception as error:  # datasets raises anything from OSError to its own types
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE")
        why = "offline mode is set" if offline else str(error).partition("\n")[0]
        raise InputError(
            "the task",
            [
                f"the data set '{path}' ({name or 'default'}, split {split}) cannot be fetched: "
                f"{why}; set `task.folder`, or LOWRES_DATA to a folder that holds it"
            ],
        ) from error
    return [dict(row) for row in rows]
