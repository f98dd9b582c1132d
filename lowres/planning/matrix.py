"""Models by cards by methods: what fits where, from one plan a model and method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowres.core.errors import LowresError
from lowres.core.plan import Cell, Matrix
from lowres.core.reading import load_recipe
from lowres.memory import device as devices
from lowres.memory.catalogue import Device
from lowres.memory.translate import Target
from lowres.planning.plan import plan, target_of
from lowres.planning.starting import starting_recipe

METHODS: dict[str, list[str]] = {
    "full": ["method=full", "levers=[gradient_checkpointing]"],
    "LoRA": ["levers=[gradient_checkpointing]"],
    "LoRA over 4 bits": ["levers=[gradient_checkpointing, nf4_weights]"],
}
SETTING = (
    "bfloat16, one row of 512 tokens at a time, gradient checkpointing, AdamW; LoRA of rank 16 on "
    "every linear layer"
)


def matrix(models: Sequence[str], cards: Sequence[Device], overrides: Sequence[str] = ()) -> Matrix:
    """Plan every method of every model; cards that behave alike share a plan.

    Raises:
        InputError: For a card that leaves nothing for tensors.
    """
    short = [model.rstrip("/").rpartition("/")[2] for model in models]
    names = models if len(set(short)) < len(set(models)) else short
    told = f"{SETTING}; {', '.join(overrides)}" if overrides else SETTING
    cells = [
        cell
        for model, name in zip(models, names, strict=True)
        for method, changes in METHODS.items()
        for cell in _cells(model, name, method, [*changes, *overrides], cards)
    ]
    return Matrix(told, cells)


def _cells(
    model: str, name: str, method: str, overrides: list[str], cards: Sequence[Device]
) -> Iterator[Cell]:
    planned: dict[Target, int] = {}
    for device in cards:
        card, target = devices.card(device), target_of(device)
        try:
            if target not in planned:
                recipe = load_recipe(starting_recipe(model), overrides)
                found = plan(recipe, device)
                context = found.card.context_bytes if found.card is not None else 0
                planned[target] = found.needed_bytes - context
        except LowresError as error:
            yield Cell(name, card.name, method, None, None, problem=str(error))
            continue
        needed = planned[target]
        # A CPU's memory is that of the machine it is in.
        fits = None if card.kind == "cpu" else needed <= card.available_bytes
        yield Cell(name, card.name, method, needed + card.context_bytes, fits)
