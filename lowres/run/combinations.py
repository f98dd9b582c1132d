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
LORA: tuple[dict[str, Any], ...] = (
    # Adapting every linear layer came closest to full fine-tuning in QLoRA (section 4 of
    # https://arxiv.org/abs/2305.14314), so it is preferred where no record tells.
    {"name": "lora", "rank": 16, "alpha": 32, "targets": "all-linear"},
    {"name": "lora", "rank": 8, "alpha": 16, "targets": "paper"},
)
_SAME_PLAN = {"paged_adamw_8bit"}
"""Planned as their relatives: what they page out is known only when memory runs short."""


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


def combinations(start: dict[str, Any], blocks: int) -> Iterator[Combination]:
    """Every method, set of levers, optimizer and freezing that go together.

    Args:
        start: Keys of a recipe for the model and the task.
        blocks: Of the model; half of them are frozen where blocks are.
    """
    methods = [
        *LORA,
        *({"name": name, **registry.load("method", name).sample_fields}
          for name in registry.names("method") if name != "lora"),
    ]  # fmt: skip
    freezings: list[Any] = [{"name": "none"}]
    if blocks > 1:
        freezings.append({"name": "prefix", "frozen": blocks // 2})
    optimizers = sorted(set(registry.names("optimizer")) - _SAME_PLAN)
    for method, levers, freezing, optimizer in itertools.product(
        methods, _subsets(registry.names("lever")), freezings, optimizers
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


def _subsets(names: list[str]) -> Iterator[tuple[str, ...]]:
    for count in range(len(names) + 1):
        yield from itertools.combinations(names, count)
