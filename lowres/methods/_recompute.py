"""Memory for time: what is cheap to compute is computed again in backward and not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.utils.checkpoint import checkpoint


def recompute(
    function: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    parameters: Iterable[torch.Tensor],
) -> torch.Tensor:
    """`function(x)`, of which only x is kept for backward: not its copy in another type, nor what
    is made of small trained parts on the way. Nothing random may happen inside.

    Args:
        parameters: What the function trains; while none of it is trained, x is not kept either.
    """
    if not any(parameter.requires_grad for parameter in parameters):
        return function(x)
    made: torch.Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return made
