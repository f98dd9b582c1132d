"""Every page and table that is made of records, made anew.

    make pages        (python -m benchmarks.pages)

Nothing is measured here: that is each module's own command.
"""

from __future__ import annotations

from benchmarks import (
    compatibility,
    freezing,
    levers,
    methods_found,
    methods_page,
    prefix_cache,
    results_page,
)
from benchmarks.planner import tables

MADE = (
    compatibility,
    freezing,
    levers,
    methods_found,
    methods_page,
    prefix_cache,
    results_page,
    tables,
)
"""Modules with a `PAGE` and its `text()`."""


def main() -> None:
    for module in MADE:
        if module.text() != module.PAGE.read_text(encoding="utf-8"):
            module.PAGE.write_text(module.text(), encoding="utf-8")
            print(f"{module.PAGE} written")


if __name__ == "__main__":
    main()
