"""Freezing that trains a few blocks at a time and others later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from lowres.core.parts import Circumstance, Freezing, part

if TYPE_CHECKING:
    import torch
    from torch import nn


@part
class Rotating(Freezing):
    """The method puts what it trains into every block; in each period some of them take part.

    Args:
        period: Updates between turns.
    """

    brings: ClassVar[frozenset[Circumstance]] = frozenset({"rotating"})

    period: Annotated[int, Field(ge=1)]

    def alone(self) -> str:
        return (
            "changes what is trained, and several processes agree once on what they exchange; use "
            "freezing 'prefix'"
        )

    def active(self, names: Sequence[str], turn: int) -> frozenset[str]:
        """Which of the blocks train in period `turn`; a function of the two alone."""
        raise NotImplementedError


class Rotation:
    """Does what the freezing of a run says at each update; nothing where it does not rotate.

    What a block trained is frozen when it leaves, and its optimizer states are dropped: kept, they
    would add up to those of the whole model. What blocks share trains in every period, in whichever
    of them it lies.

    Args:
        model: Before adapters are put around it.
        names: Paths of its blocks.
    """

    def __init__(self, freezing: Freezing, model: nn.Module, names: Sequence[str]) -> None:
        self._freezing = freezing if isinstance(freezing, Rotating) else None
        self._names = tuple(names)
        # By themselves, since paths change when a plan takes blocks out.
        self._blocks = {name: model.get_submodule(name) for name in names}
        self._own: dict[str, list[nn.Parameter]] = {}
        self._now: frozenset[str] | None = None

    def turn(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set what trains in update `step`."""
        if self._freezing is None:
            return
        if self._now is None:
            from lowres.core.delta import shared_parameters

            shared = {id(p) for b in self._blocks.values() for p in shared_parameters(b)}
            self._own = {
                name: [p for p in b.parameters() if p.requires_grad and id(p) not in shared]
                for name, b in self._blocks.items()
            }
        now = self._freezing.active(self._names, step // self._freezing.period)
        if now == self._now:
            return
        self._now = now
        for name, parameters in self._own.items():
            for parameter in parameters:
                parameter.requires_grad_(name in now)
                if name not in now:
                    parameter.grad = None
                    optimizer.state.pop(parameter, None)
