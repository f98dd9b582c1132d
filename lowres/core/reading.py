"""Reading a recipe: every problem is collected with its line and shown at once.

Unknown keys, wrong types, missing sections, unknown parts, a part that refuses another.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from lowres.core import registry
from lowres.core.errors import InputError, PartsRefuse, Problem
from lowres.core.recipe import KEYS, OPTIONAL, SCHEMA, SECTIONS, Loop, Recipe, line_of


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a YAML file or a mapping.

    Args:
        source: Path, or keys as they would stand in the file.
        overrides: `key=value` with dotted keys (`method.rank=4`, `levers.0.name=x`), values in
            YAML.

    Raises:
        InputError: With every problem found; `PartsRefuse` where each part by itself reads well.
    """
    return _reader(source, overrides).recipe()


def raw_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The keys as they would stand in a file with the overrides in it, not looked at any further.

    Raises:
        InputError: For a file that cannot be read as keys, or an override that fits none of them.
    """
    reader = _reader(source, overrides)
    reader.override()
    reader.stop_at_problems()
    return reader.raw


def _reader(source: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> _Reader:
    if isinstance(source, Mapping):
        return _Reader(copy.deepcopy(dict(source)), {}, None, overrides)
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"'{path}'", [f"cannot be read: {why}"]) from None
    try:
        raw, lines = _loaded(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else None
        what = getattr(error, "problem", None) or str(error)
        raise InputError(
            f"'{path}'", [Problem("", f"it is not valid YAML: {what}", line)]
        ) from None
    if not isinstance(raw, dict):
        raise InputError(
            f"'{path}'", ["it holds no keys; see recipes/quickstart.yaml for the form"]
        )
    return _Reader(raw, lines, str(path), overrides)


def _loaded(text: str) -> tuple[Any, dict[str, int]]:
    """The value of a YAML document, and the line of each of its keys."""
    node = yaml.compose(text, Loader=_Yaml)
    try:
        lines = dict(_lines(node))
    except RecursionError:
        raise yaml.YAMLError("an alias (*) stands within what it names") from None
    return yaml.load(text, Loader=_Yaml), lines  # noqa: S506  (_Yaml is a SafeLoader)


class _Yaml(yaml.SafeLoader):
    """YAML in which 2e-4 is a number (YAML 1.1 wants 2.0e-4) and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key must be a word", problem_mark=key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key '{key_node.value}' stands twice",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


# Nothing in a recipe is a date: 2024-13-01 is a name, as 2024-12-01 is.
_Yaml.yaml_implicit_resolvers = {
    first: [known for known in all_known if known[0] != "tag:yaml.org,2002:timestamp"]
    for first, all_known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _lines(node: yaml.Node | None, path: str = "") -> Iterator[tuple[str, int]]:
    """Dotted key to line, for every key and list item of a document."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = f"{path}.{key.value}" if path else str(key.value)
            yield here, key.start_mark.line + 1
            yield from _lines(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield f"{path}.{i}", value.start_mark.line + 1
            yield from _lines(value, f"{path}.{i}")


def _hint(word: str, known: Sequence[str]) -> str:
    """What a key may have meant; all that there are where none is near."""
    near = registry.did_you_mean(word, known)
    return near or (f"; there are {', '.join(known)}" if known else "; it takes none")


class _Reader:
    """Turns raw keys into a Recipe while collecting problems."""

    def __init__(
        self,
        raw: dict[str, Any],
        lines: dict[str, int],
        source: str | None,
        overrides: Sequence[str],
    ) -> None:
        self.raw, self.lines, self.source, self.overrides = raw, lines, source, tuple(overrides)
        self.problems: list[Problem] = []

    def override(self) -> None:
        for override in self.overrides:
            self._override(override)

    def recipe(self) -> Recipe:
        self.override()
        for key in self.raw:
            if key not in KEYS:
                self._add(str(key), f"is not a key{_hint(str(key), KEYS)}")
        read: dict[str, Any] = {}
        for key in KEYS:
            if key in self.raw or key in OPTIONAL:
                read[key] = self._read(key, self.raw.get(key, OPTIONAL.get(key)))
            else:
                self._add(key, "is missing")
        if isinstance(read.get("loop"), Loop):
            for problem in read["loop"].problems():
                self._add(problem.where, problem.text)
        self.stop_at_problems()
        recipe = Recipe(**read, source=self.source, overrides=self.overrides, lines=self.lines)
        self._let_parts_check(recipe)
        self.stop_at_problems(PartsRefuse)
        return recipe

    def _read(self, key: str, value: Any) -> Any:
        if key == "schema":
            if value != SCHEMA:
                self._add(key, f"is {value!r}; this version reads {SCHEMA}")
            return value
        if key in SECTIONS:
            return self._validate(SECTIONS[key], value, key)
        if key == "levers":
            if not isinstance(value, list):
                self._add(key, f"is {value!r}; give a list such as [gradient_checkpointing]")
                return ()
            return tuple(self._part("lever", one, f"levers.{i}") for i, one in enumerate(value))
        return self._part(key, value, key)

    def _part(self, family: str, value: Any, where: str) -> Any:
        fields = {"name": value} if isinstance(value, str) else value
        if not isinstance(fields, dict) or not isinstance(fields.get("name"), str):
            self._add(where, f"is {value!r}; give a name, or a mapping with `name`")
            return None
        name = fields["name"]
        if name not in registry.names(family):
            self._add(where, registry.unknown(family, name))
            return None
        rest = {k: v for k, v in fields.items() if k != "name"}
        return self._validate(registry.load(family, name), rest, where)

    def _validate(self, cls: type[Any], value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            self._add(where, f"is {value!r}; give a mapping of its fields")
            return None
        known = [f.name for f in dataclasses.fields(cls)]
        try:
            return TypeAdapter(cls).validate_json(json.dumps(value, default=str), strict=True)
        except ValidationError as error:
            for e in error.errors():
                at = ".".join([where, *(str(x) for x in e["loc"])])
                leaf = str(e["loc"][-1]) if e["loc"] else ""
                if e["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                    self._add(at, f"is not a field{_hint(leaf, known)}")
                elif e["type"] in ("missing", "missing_keyword_only_argument", "missing_argument"):
                    self._add(at, "is missing")
                else:
                    self._add(at, f"is {e['input']!r}; {e['msg'][0].lower()}{e['msg'][1:]}")
            return None

    def _override(self, text: str) -> None:
        key, equals, value = text.partition("=")
        if not equals or not key:
            self._add("--set", f"'{text}' is not of the form KEY=VALUE")
            return
        try:
            parsed, _ = _loaded(value)
        except yaml.YAMLError:
            self._add("--set", f"the value of '{text}' is not valid YAML")
            return
        *parents, last = key.split(".")
        at: Any = self.raw
        for parent in parents:
            slot: Any = int(parent) if isinstance(at, list) and parent.isdigit() else parent
            try:
                below = at[slot]
            except (KeyError, IndexError):
                if isinstance(at, list):
                    self._add("--set", f"'{key}' names no item of a list of {len(at)}")
                    return
                below = at[slot] = {}
            except TypeError:
                self._add("--set", f"'{key}' goes below a value")
                return
            if isinstance(below, str):
                below = at[slot] = {"name": below}
            elif below is None:
                below = at[slot] = {}
            at = below
        if isinstance(at, list):
            if not last.isdigit() or int(last) >= len(at):
                self._add("--set", f"'{key}' names no item of a list of {len(at)}")
                return
            at[int(last)] = parsed
        elif isinstance(at, dict):
            at[last] = parsed
        else:
            self._add("--set", f"'{key}' goes below a value")
        self.lines = {
            k: v for k, v in self.lines.items() if k != key and not k.startswith(key + ".")
        }

    def _let_parts_check(self, recipe: Recipe) -> None:
        if recipe.task.asks not in recipe.objective.serves:
            self._add(
                "objective",
                f"'{recipe.objective.name}': it cannot serve the task '{recipe.task.name}', which "
                f"asks for a {recipe.task.asks}; it serves "
                f"{', '.join(sorted(recipe.objective.serves))}",
            )
            return
        parts = {f: getattr(recipe, f) for f in registry.FAMILIES if f != "lever"}
        parts |= {f"levers.{i}": lever for i, lever in enumerate(recipe.levers)}
        for where, one in parts.items():
            for text in one.check(recipe):
                self._add(where, f"'{one.name}': {text}")
        twice = [lv.name for i, lv in enumerate(recipe.levers) if lv.name in
                 [x.name for x in recipe.levers[:i]]]  # fmt: skip
        for name in twice:
            self._add("levers", f"'{name}' stands twice")

    def _add(self, where: str, text: str) -> None:
        self.problems.append(Problem(where, text, line_of(self.lines, where)))

    def stop_at_problems(self, kind: type[InputError] = InputError) -> None:
        if self.problems:
            raise kind(self.source or "the recipe", self.problems)
