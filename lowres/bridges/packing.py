"""Keeping rows apart that lie in one, told by their positions, in transformers' decoders."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lowres.bridges.peft import unwrap_adapted
from lowres.core.learner import forward_arguments

if TYPE_CHECKING:
    from torch import nn

_BY_POSITION = {"full_attention", "sliding_attention"}
"""Kinds of blocks whose masks transformers 5.23 makes of positions that begin anew."""


def separate(model: nn.Module) -> str | None:
    """Make the model keep packed rows apart. Returns why it cannot; None where it does."""
    inner: Any = unwrap_adapted(model)
    why = _runs_on(inner)
    if why is not None:
        return why
    from transformers.masking_utils import create_masks_for_generate

    def give_mask(_: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        positions = given.get("position_ids")
        if positions is not None and given.get("attention_mask") is None:
            # Of the input the function reads size, type and device alone.
            shape_of_input = positions.new_empty((*positions.shape, 0), dtype=inner.dtype)
            given["attention_mask"] = create_masks_for_generate(
                inner.config, shape_of_input, None, None, position_ids=positions
            )
        return args, given

    # Given to every model, since not all of them tell transformers their positions (OPT does not).
    # To the stack itself: PEFT and the model call what is above it by `forward`, or pass it by.
    inner.get_decoder().register_forward_pre_hook(give_mask, with_kwargs=True)
    return None


def _runs_on(inner: Any) -> str | None:
    """Why a row would see the one before it, whatever the mask says."""
    from torch import nn

    name = type(inner).__name__
    if "position_ids" not in forward_arguments(inner):
        return f"{name} takes no position_ids, so its positions cannot begin anew in each row"
    if getattr(inner.config, "alibi", False):
        return f"{name} weighs by distances over the whole packed row (alibi)"
    if not hasattr(sys.modules[type(inner).__module__], "create_causal_mask"):
        return f"{name} makes a mask of its own, which does not look for packed rows"
    others = set(getattr(inner.config, "layer_types", None) or ()) - _BY_POSITION
    if others:
        return f"{name} has blocks of the kind {', '.join(sorted(others))}, which run on over rows"
    convolutions = [path for path, m in inner.named_modules() if isinstance(m, nn.Conv1d)]
    if convolutions:
        return f"{name} mixes neighbouring tokens in {convolutions[0]}, which runs on over rows"
    return None
