"""`lowres show`: one part with its source, fields and defaults; of a method also its counts."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    name="show",
    epilog="example: lowres show method lora --model package:lowres/assets/tiny_lm "
    "--set method.rank=4",
)
def command(
    family: Annotated[
        str, typer.Argument(help="task, method, freezing, objective, optimizer, lever, ...")
    ],
    name: Annotated[str, typer.Argument(help="The part's name, as lowres list gives it.")],
    model: Annotated[
        Optional[str],
        typer.Option(help="Of a method: count what it trains there; hub id, or a folder with a "
                     "config.json. Reads no weights."),
    ] = None,
    overrides: Annotated[
        Optional[list[str]],
        typer.Option("--set", metavar="KEY=VALUE", help="With --model: change a key. Repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:  # fmt: skip
    """Show what a part does, where it comes from, and its keys in a recipe."""
    import inspect

    from lowres.core import registry
    from lowres.core.errors import InputError

    family = registry.family(family)
    cls: Any = registry.load(family, name)
    if model is not None and family != "method":
        raise InputError("the command", [f"--model counts what a method trains, not a {family}"])
    if overrides and model is None:
        raise InputError("the command", ["--set changes what is counted, and goes with --model"])
    fields = _fields(cls)
    text = registry.docstring(family, name)
    facts = _facts(cls, name, text) if family == "method" else {}
    told = None if model is None else _counts(name, model, overrides or [])
    if as_json:
        out = {"family": family, "name": name, "about": text, "fields": fields, **facts}
        if told is not None:
            out["counts"] = told
        typer.echo(json.dumps(out, indent=1, default=list))
        return
    typer.echo(f"{family} {name}   ({registry.source(family, name).name})\n\n{text}\n")
    typer.echo(inspect.getdoc(cls) or "")
    if facts:
        _print_facts(facts)
    typer.echo("\nkeys:" if fields else "\nno keys")
    for f_ in fields:
        value = "required" if f_["required"] else f"default {f_['default']!r}"
        typer.echo(f"  {f_['name']}: {f_['type']}   {value}")
    if told is not None:
        of = f"{told['share']:.4%} of the model's {told['model']:,} parameters"
        typer.echo(f"\ntrains on {model}: {told['trainable']:,} ({of})")


def _fields(cls: Any) -> list[dict[str, Any]]:
    fields = []
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        default = None if required else getattr(f.default, "default", f.default)
        required = required or str(default) == "PydanticUndefined"
        fields.append(
            {"name": f.name, "type": str(f.type), "required": required,
             "default": None if required else default}
        )  # fmt: skip
    return fields


def _facts(cls: Any, name: str, text: str) -> dict[str, Any]:
    """What a method says of itself."""
    paper = re.search(r"^Paper: (.*?)(?:\n\n|\Z)", text, flags=re.DOTALL | re.MULTILINE)
    return {
        "taxonomy": cls.taxonomy,
        "paper": " ".join(paper[1].split()) if paper else None,
        "mergeable": cls.mergeable,
        "starts_as_base": cls.starts_as_base,
        "trains_weights": cls.trains_weights,
        "learning_rates": list(cls.learning_rate_hint),
        "over_few_bits": cls.few_bits(),
        "refuses": dict(cls.refuses),
        "measured": _measured(name),
    }


def _measured(name: str) -> dict[str, Any]:
    """What runs told of a method, as it ships with lowres; empty where none was made."""
    import lowres

    file = Path(lowres.__file__).parent / "assets" / "methods" / "found.json"
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")).get(name, {})
    return told


def _print_facts(facts: dict[str, Any]) -> None:
    low, high = facts["learning_rates"]
    begins = "yes" if facts["starts_as_base"] else "no: the first outputs are others"
    typer.echo(f"\nclass: {facts['taxonomy']}")
    typer.echo(f"mergeable: {'yes' if facts['mergeable'] else 'no'}")
    typer.echo(f"starts as the checkpoint: {begins}")
    bits = [{"nf4": "4 bits", "int8": "8 bits"}[kind] for kind in facts["over_few_bits"]]
    why = ": it trains the checkpoint's own matrices" if facts["trains_weights"] else ""
    typer.echo(f"over weights in fewer bits: {' and '.join(bits) or f'no{why}'}")
    measured = facts["measured"]
    if measured:
        typer.echo(
            f"saves, beside full fine-tuning: {measured['saves']}; does not save: "
            f"{measured['does_not_save']} (one shape on a CPU, docs/methods.md)"
        )
    typer.echo(f"learning rates: {low:g} to {high:g}")
    for told in measured.get("rates", ()):
        rates = ", ".join(f"{rate:g}" for rate in told["tried"])
        typer.echo(
            f"  as good as the best of {rates} in runs: {told['rate']:g} ({told['task']}, "
            f"{told['rows']:,} rows, {told['model']}, {told['optimizer']})"
        )
    typer.echo("refuses:" if facts["refuses"] else "refuses: nothing")
    for circumstance, why in facts["refuses"].items():
        typer.echo(f"  {circumstance}: {why}")


def _counts(name: str, model: str, overrides: list[str]) -> dict[str, Any]:
    """What the method trains on a model; refused settings and models are told as in a recipe."""
    from lowres.core.reading import load_recipe
    from lowres.planning.assumed import config_of
    from lowres.planning.counts import counts
    from lowres.planning.starting import starting_recipe

    raw = starting_recipe(model) | {"method": {"name": name}}
    recipe = load_recipe(raw, overrides)
    found = counts(recipe.method, config_of(model), recipe.freezing)
    return {"of": model, "trainable": found.trainable, "model": found.model, "share": found.share}
