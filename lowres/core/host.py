"""What is kept in host memory on purpose, said where it is made.

Both functions are looked up in this module at every use: the planner answers in their place for the
device that it plans for.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def apart(device: torch.device) -> bool:
    """Whether a device has memory of its own, so that moving something to the host frees any."""
    return device.type != "cpu"


def on_host() -> contextlib.AbstractContextManager[None]:
    """What is made or computed while the block runs is so in host memory."""
    return contextlib.nullcontext()
