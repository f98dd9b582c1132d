"""bitsandbytes' optimizers with states in 8 bits."""

from __future__ import annotations

from typing import Any, Literal

import torch

from lowres.bridges.bitsandbytes import bnb
from lowres.core import host

PAGED_FROM = 100_000
"""Elements from which bitsandbytes 0.50 pages a state."""


class _BitsByGroup:
    """Reads `optim_bits` off the parameter group.

    bitsandbytes 0.50 would take exceptions from an object of the whole process, by the position of
    a parameter: those of one run would hold for the next.
    """

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        config = super().get_config(gindex, pindex, group)  # type: ignore[misc]
        return config | {"optim_bits": group["optim_bits"]}


class AdamW8bit(_BitsByGroup, bnb.optim.AdamW8bit):
    pass


class PagedAdamW8bit(_BitsByGroup, bnb.optim.PagedAdamW8bit):
    def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A buffer in memory that the driver moves to the host when the device's runs short, which
        is where it is counted; small ones are bitsandbytes' plain ones."""
        if p.numel() < PAGED_FROM:
            return super().get_state_buffer(p, dtype)
        with host.memory():
            return host.mark(super().get_state_buffer(p, dtype))

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """As bitsandbytes 0.50, which would put paged states on the device for good."""
        super().load_state_dict(state_dict, move_to_device=False)
        for parameter, state in self.state.items():
            for key in ("state1", "state2"):
                held = self.get_state_buffer(parameter, dtype=state[key].dtype)
                state[key] = held.copy_(state[key])
        self.to_gpu()


def optimizer(
    name: Literal["AdamW8bit", "PagedAdamW8bit"], groups: list[dict[str, Any]], **fields: Any
) -> torch.optim.Optimizer:
    """An optimizer with states in 8 bits.

    Args:
        groups: Parameter groups, each with `optim_bits` 8 or 32.
        fields: As bitsandbytes names them.
    """
    kinds: dict[str, Any] = {"AdamW8bit": AdamW8bit, "PagedAdamW8bit": PagedAdamW8bit}
    made: torch.optim.Optimizer = kinds[name](groups, **fields)
    return made
