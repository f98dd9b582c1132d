"""What a run that begins says of its data, weights and choices, for the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from lowres.core.rotation import Rotating
from lowres.making import weights
from lowres.run.diagnosis import NATIVE_BF16

if TYPE_CHECKING:
    from lowres.core.recipe import Recipe
    from lowres.making.build import Built


def remarks(
    recipe: Recipe, built: Built, device: torch.device, unplanned: str | None
) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Kind and text of each event, and names that belong to it, maybe many.

    Args:
        unplanned: Why there is no plan; None where there is one.
    """
    for remark in built.inputs.data.remarks:
        yield "data", remark, ()
    yield from of_weights(recipe, built.loaded, built.model, device)
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


def of_weights(
    recipe: Recipe, loaded: Mapping[str, torch.dtype], model: torch.nn.Module, device: torch.device
) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Kind, text and names of the events about the weights of a run that begins.

    Args:
        loaded: `weights.types_of` the model when it was loaded.
    """
    cuda = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if cuda else None
    changed = weights.casts(loaded, model)
    if changed is not None:
        yield "cast", *changed
    emulated = remark_on_bfloat16(recipe, weights.types_of(model), capability)
    if emulated is not None:
        yield "bfloat16", emulated, ()


def remark_on_bfloat16(
    recipe: Recipe, types: Mapping[str, torch.dtype], capability: tuple[int, int] | None
) -> str | None:
    """What to say when a card before Ampere is asked for bfloat16, which it emulates slowly.

    Args:
        types: Of the parameters, by name.
        capability: Of the CUDA device; None when there is none.
    """
    if capability is None or capability >= NATIVE_BF16:
        return None
    asked = [f"loop.precision {recipe.loop.precision}"] * (recipe.loop.precision == "bf16")
    asked += ["bfloat16 weights"] * (torch.bfloat16 in types.values())
    if not asked:
        return None
    return (
        f"{' and '.join(asked)}: this card (capability {capability[0]}.{capability[1]}) has no "
        "bfloat16 units and emulates them slowly; set loop.precision to fp16 and hold what is "
        "frozen in float16 (fp16_weights)"
    )
