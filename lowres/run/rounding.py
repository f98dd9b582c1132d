"""Do updates arrive at weights of 16 bits? Bfloat16 has 8 bits of precision, so a step of less than
about a five-hundredth of a weight is rounded away; a run then says nothing and learns little.

One update is looked at, the first whose learning rate is at least half of the recipe's. What is
compared are a few elements of each tensor, read as integers: no memory of the device is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

ELEMENTS = 256
"""Of a tensor that are compared, evenly spread."""
SHARE = 0.5
"""Of the trained weights unchanged from which it is worth a remark."""


class Rounding:
    """The share of weights that one update leaves as they are.

    Embeddings are left out: rows of words that did not occur have nothing to learn.

    Args:
        rate: The recipe's learning rate.
        event: Notes it, as `Session.event`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: float,
        event: Callable[[str, str], None],
    ) -> None:
        self._model, self._optimizer, self._event = model, optimizer, event
        self._rate = rate
        self._before: dict[str, list[int]] = {}
        self._watching = rate > 0

    def begin(self) -> None:
        """Remember what is there before an update."""
        if self._watching:
            self._before = {name: _sample(p) for name, p in self._narrow()}
            self._watching = bool(self._before)

    def updated(self, rate: float) -> None:
        """Look at an update that was made.

        Args:
            rate: Its learning rate, the largest of all groups.
        """
        if not self._watching:
            return
        if rate < self._rate / 2:  # a warm-up
            self.begin()
            return
        self._watching = False
        still = total = 0.0
        for name, parameter in self._narrow():
            # What has just come in was not looked at; a wider copy takes up what is rounded away.
            if name in self._before and "master" not in self._optimizer.state.get(parameter, {}):
                after, before = _sample(parameter), self._before[name]
                same = sum(a == b for a, b in zip(after, before, strict=True)) / len(after)
                still += same * parameter.numel()
                total += parameter.numel()
        if total and still > SHARE * total:
            self._event(
                "rounding",
                f"an update at a learning rate of {rate:g} left {still / total:.0%} of the trained "
                "weights of 16 bits as they were: smaller steps than they resolve are rounded "
                "away; raise optimizer.lr, or hold them in float32 (model.dtype, or float32_master "
                "of the lever optimizer_offload)",
            )

    def _narrow(self) -> Iterator[tuple[str, nn.Parameter]]:
        tables = {id(m.weight) for m in self._model.modules() if isinstance(m, nn.Embedding)}
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and parameter.numel() and id(parameter) not in tables:
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    yield name, parameter


def _sample(parameter: nn.Parameter) -> list[int]:
    flat = parameter.detach().reshape(-1)
    spread = flat[:: max(1, flat.numel() // ELEMENTS)][:ELEMENTS]
    return [int(bits) for bits in spread.view(torch.int16).tolist()]
