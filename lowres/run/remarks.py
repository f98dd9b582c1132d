"""What a run that begins says of its data, weights and choices, for the record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lowres.core.rotation import Rotating
from lowres.run import weights

if TYPE_CHECKING:
    import torch

    from lowres.core.recipe import Recipe
    from lowres.run.build import Built


def remarks(
    recipe: Recipe, built: Built, device: torch.device, unplanned: str | None
) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Kind and text of each event, and names that belong to it, maybe many.

    Args:
        unplanned: Why there is no plan; None where there is one.
    """
    for remark in built.inputs.data.remarks:
        yield "data", remark, ()
    yield from weights.remarks(recipe, built.loaded, built.model, device)
    if unplanned is not None:
        yield "plan", unplanned, ()
    blocks = built.learner.blocks
    if blocks.head:
        yield "head", "trained whole, made anew where the checkpoint has none: ", blocks.head
    freezing = recipe.freezing
    if blocks.scores:
        trained = ", ".join(name for name in blocks.names if name in blocks.trained)
        scores = ", ".join(f"{score:.4g}" for score in blocks.scores)
        yield (
            "freezing",
            f"{freezing.name} trains {len(blocks.trained)} of {len(blocks.names)} blocks "
            f"({trained}); scores from the input up: {scores}",
            (),
        )
    if isinstance(freezing, Rotating):
        at_once = len(freezing.active(blocks.names, 0))
        yield (
            "freezing",
            f"{freezing.name} trains {at_once} of {len(blocks.names)} blocks at a time, others "
            f"after every {freezing.period} updates",
            (),
        )
