"""docs/compatibility.md, from the table that ships with lowres."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

from lowres.bench.compatibility import RECOMPUTING, forms, kinds
from lowres.core import registry
from lowres.core.compatibility import PAIRED_WITH, Cell, Combination, Table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"
SIGNS = {"works": "works", "refused": "refused", "fails": "**fails**"}
HEAD = """# What goes together

Each cell was run: two updates on a tiny decoder, a checkpoint after each, the saved model loaded by
transformers and PEFT alone, merged where the method can be, and a resume from the first checkpoint.
*works* means that losses and saved tensors of both runs are equal, bit for bit; that the model that
was loaded gives the logits of the one that was trained, bit for bit; and that the merged one gives
those of the adapter beside the base in `model.dtype`, within the tolerance of `lowres.run.merging`
(relative 1e-4 in float32). *refused* means that lowres says no before training; *fails* that it
ought to work and does not.
The numbers lead to the reasons at the end. `lowres check RECIPE` reads the same table; `lowres
bench compatibility` runs what it lacks, and `make pages` writes this page.
`-` is no cell: two levers stand with LoRA under *Pairs of levers*, and no lever stands twice. Date
and versions are those of the newest cells. A lever that works otherwise with other fields has a
column for them too:
"""


def text() -> str:
    """The page."""
    return page(Table.read())


def page(table: Table) -> str:
    """The page of a table."""
    reasons: dict[str, int] = {}

    def shown(key: str) -> str:
        cell = table.cells[key]
        if cell.outcome == "works":
            return "works"
        number = reasons.setdefault(_reason(cell), len(reasons) + 1)
        return f"{SIGNS[cell.outcome]} [{number}]"

    counted = Counter(cell.outcome for cell in table.cells.values())
    told = table.environment
    versions = ", ".join(f"{k} {v}" for k, v in told["versions"].items() if v and k != "lowres")
    levers = forms()
    out = [
        HEAD + "".join(_form(name, told) for name, told in levers.items() if name != told["name"]),
        f"{len(table.cells)} combinations: "
        + ", ".join(f"{count} {name}" for name, count in sorted(counted.items()))
        + f". On {told['device']}, {told['date']}; {versions}.\n",
    ]
    weights, engines, others = kinds()
    columns = [(), *((name,) for name in engines)]
    for method in registry.names("method"):
        heads = [" + ".join(column) or "alone" for column in columns]
        out += [f"## {method}\n", f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
        for first, second in itertools.product([(), *((n,) for n in weights)], RECOMPUTING):
            keys = [Combination(method, first + second + column).key for column in columns]
            name = " + ".join(first + second) or "no lever"
            out.append(f"| {name} | " + " | ".join(map(shown, keys)) + " |")
        for name in others:
            blanks = " - |" * len(engines)
            out.append(f"| {name} | {shown(Combination(method, (name,)).key)} |{blanks}")
        out.append("")
    out += ["## Pairs of levers\n", f"With {PAIRED_WITH}; the row's lever stands first.\n"]
    out += ["| | " + " | ".join(levers) + " |", "|---|" + "---|" * len(levers)]
    for first in levers:
        keys = [" + ".join((PAIRED_WITH, first, second)) for second in levers]
        own = [levers[first]["name"] == told["name"] for told in levers.values()]
        cells = ["-" if same else shown(key) for same, key in zip(own, keys, strict=True)]
        out.append(f"| {first} | " + " | ".join(cells) + " |")
    out += ["", "## Why not", ""]
    out += [f"{number}. {text}" for text, number in reasons.items()]
    return "\n".join(out) + "\n"


def _form(called: str, told: dict[str, Any]) -> str:
    fields = ", ".join(f"{key}: {value}" for key, value in told.items())
    return f"*{called}* is `{{{fields}}}`.\n"


def _reason(cell: Cell) -> str:
    return cell.reason.replace("|", "\\|").replace("<", "&lt;")
