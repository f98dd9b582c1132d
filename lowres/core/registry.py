"""Parts found by name: listing a family is listing its folder.

A part is the one class marked `@part` in `lowres/<family>/<name>.py`. Listing and describing read
files and import nothing, so `lowres list` needs no torch.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lowres.core.errors import InputError, Problem

if TYPE_CHECKING:
    from lowres.core.parts import Part

FAMILIES = {
    "task": "tasks",
    "method": "methods",
    "freezing": "freezing",
    "objective": "objectives",
    "optimizer": "optimizers",
    "lever": "levers",
    "procedure": "procedures",
}
"""Family (as in a recipe) to folder (as on disk), in the order of a run."""

_PACKAGE = Path(__file__).resolve().parent.parent


def family(word: str) -> str:
    """The family for a word that may be singular or plural.

    Raises:
        InputError: With the nearest family, or else with all.
    """
    for singular, folder in FAMILIES.items():
        if word in (singular, folder):
            return singular
    hint = did_you_mean(word, FAMILIES) or f"; there are {', '.join(FAMILIES.values())}"
    raise InputError("the command", [f"no family is named '{word}'{hint}"])


def names(family: str) -> list[str]:
    """The names of a family's parts, sorted."""
    folder = _PACKAGE / FAMILIES[family]
    return sorted(f.stem for f in folder.glob("*.py") if not f.stem.startswith("_"))


def source(family: str, name: str) -> Path:
    """The one file of a part."""
    return _PACKAGE / FAMILIES[family] / f"{name}.py"


def docstring(family: str, name: str) -> str:
    """The module docstring of a part, read without importing it."""
    text = source(family, name).read_text(encoding="utf-8")
    if text.startswith('"""'):
        text = text[: text.index('"""', 3) + 3]  # Parsing the rest of every file takes a while.
    return ast.get_docstring(ast.parse(text)) or ""


def constant(family: str, name: str, attribute: str) -> str | None:
    """A class attribute that a part writes as a string on one line; read without importing.

    None where its file has no such line.
    """
    # Parsing every file whole would take half the time of `lowres list`.
    line = re.compile(rf'^    {attribute}: .*= "(.*)"$', re.MULTILINE)
    found = line.search(source(family, name).read_text(encoding="utf-8"))
    return found[1] if found else None


def load(family: str, name: str) -> type[Part]:
    """The class of a part. Raises InputError with a suggestion when there is none of that name."""
    if name not in names(family):
        raise InputError("the recipe", [Problem(family, unknown(family, name))])
    module = importlib.import_module(f"lowres.{FAMILIES[family]}.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and getattr(value, "family", None) == family
        and not value.__name__.startswith("_")
    ]
    if len(found) != 1:
        raise InputError(
            str(source(family, name)),
            [f"a {family} file holds exactly one class marked @part, this one holds {len(found)}"],
        )
    return found[0]


def unknown(family: str, name: str) -> str:
    """The message for a part that does not exist."""
    there = names(family)
    article = "an" if family[0] in "aeiou" else "a"
    hint = did_you_mean(name, there)
    return f"no {family} is named '{name}'{hint or f'; there is {article} ' + ', '.join(there)}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
