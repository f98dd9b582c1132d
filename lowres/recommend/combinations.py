"""The recipes that a search weighs: every legal combination of parts, then of sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lowres.core import registry
from lowres.core.errors import InputError
from lowres.core.reading import load_recipe
from lowres.core.recipe import Recipe

ROWS = (1, 2, 4, 8, 16)
LENGTHS = (128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 3072, 4096)
LONG = (6144, 8192, 12288, 16384, 24576, 32768)
"""Further lengths, searched where the longest rows are asked for."""
LORA: tuple[dict[str, Any], ...] = (
    # Adapting every linear layer came closest to full fine-tuning in QLoRA (section 4 of
    # https://arxiv.org/abs/2305.14314), so it is preferred where no record tells.
    {"name": "lora", "rank": 16, "alpha": 32, "targets": "all-linear"},
    {"name": "lora", "rank": 8, "alpha": 16, "targets": "paper"},
)


@dataclass(frozen=True)
class Combination:
    """One choice of parts.

    Args:
        raw: Keys of the recipe.
        settings: What distinguishes it from others.
        preference: Position of its method where nothing else decides.
        lossy: What of it changes the result of training, by name.
    """

    recipe: Recipe
    raw: dict[str, Any]
    settings: dict[str, Any]
    lossy: tuple[str, ...]
    preference: int = 0


def stages() -> list[int]:
    """The stages of a search: each brings in levers that cost more than those before."""
    loaded: list[Any] = [registry.load("lever", name) for name in registry.names("lever")]
    return sorted({lever.searched for lever in loaded if lever.searched is not None})


def combinations(start: dict[str, Any], blocks: int, stage: int = 0) -> Iterator[Combination]:
    """Every method, set of levers, optimizer and freezing that go together.

    Args:
        start: Keys of a recipe for the model and the task.
        blocks: Of the model; half of them are frozen where blocks are.
        stage: Of `stages`. At the first all sets of its levers are tried; afterwards those with all
            levers of the earlier stages that only move or recompute bytes, one more, and no more.
    """
    methods = [
        *LORA,
        *({"name": n} for n in registry.names("method") if n != "lora" and _searched("method", n)),
    ]  # fmt: skip
    freezings: list[Any] = [{"name": "none"}]
    if blocks > 1:
        freezings.append({"name": "prefix", "frozen": blocks // 2})
    optimizers = [n for n in registry.names("optimizer") if _searched("optimizer", n)]
    for method, levers, freezing, optimizer in itertools.product(
        methods, _lever_sets(stage, start), freezings, optimizers
    ):
        rate = start["optimizer"]["lr"] / (10 if method["name"] == "full" else 1)
        raw = start | {
            "method": method,
            "levers": [{"name": name} for name in levers],
            "optimizer": {"name": optimizer, "lr": rate},
            "freezing": freezing,
        }
        try:
            recipe = load_recipe(raw)
        except InputError:
            continue  # The parts refuse each other, or need fields that a search cannot choose.
        lossy = [lever.name for lever in recipe.levers if lever.effect == "lossy"]
        lossy += [optimizer] if optimizer != "adamw" else []
        lossy += ["frozen blocks"] if freezing["name"] != "none" else []
        targets = f" ({method['targets']})" if "targets" in method else ""
        settings = {
            "method": method["name"] + targets,
            "levers": " + ".join(levers) or "none",
            "optimizer": optimizer,
            "freezing": "none" if freezing["name"] == "none" else f"lower {blocks // 2} blocks",
        }
        yield Combination(recipe, raw, settings, tuple(lossy), methods.index(method))


def _searched(family: str, name: str) -> bool:
    cls: Any = registry.load(family, name)
    return bool(cls.searched)


def _taken(start: dict[str, Any], lever: str) -> bool:
    try:
        load_recipe(start | {"levers": [{"name": lever}]})
    except InputError:
        return False
    return True


def _lever_sets(stage: int, start: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Sets of levers to try at a stage."""
    by_stage: dict[int, list[str]] = {}
    lossy = set()
    for name in registry.names("lever"):
        lever: Any = registry.load("lever", name)
        if lever.searched is not None:
            by_stage.setdefault(lever.searched, []).append(name)
            lossy |= {name} if lever.effect == "lossy" else set()
    first = by_stage.get(0, [])
    if stage == 0:
        for count in range(len(first) + 1):
            yield from itertools.combinations(first, count)
        return
    # Nothing fitted with less: keep all that is exact and that the recipe does not refuse, such as
    # one for logits where there are none, and try the lossy ones of the first stage.
    exact = [n for at in range(stage) for n in by_stage.get(at, []) if n not in lossy]
    kept = [n for n in exact if _taken(start, n)]
    for other in [(), *((name,) for name in first if name in lossy)]:
        for count in range(1, len(by_stage[stage]) + 1):
            for more in itertools.combinations(by_stage[stage], count):
                yield (*kept, *other, *more)
