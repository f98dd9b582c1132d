"""What a method adds to one module: the part of an adapter that is mathematics.

A method that PEFT lacks writes a Delta; `bridges.peft_tuner` makes it a PEFT tuner (saving, several
adapters, disabling, merging).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from lowres.core.errors import LowresError


@dataclass(frozen=True)
class Piece:
    """One kind of delta and where it goes.

    Args:
        delta: The class, at the top level of a module under `lowres.methods`.
        targets: Paths of modules. The order in which deltas are made is that of the model's
            modules, whatever the order here.
        settings: What the class is given, JSON-ready.
    """

    delta: type[Delta]
    targets: Sequence[str]
    settings: Mapping[str, Any] = field(default_factory=dict)


class Delta(nn.Module):
    """Trained parameters beside one frozen module, and how its output changes by them.

    Parameters are made in float32 or the base's type and may be cast by PEFT: what is computed with
    them takes its input to their type and gives the result in the output's (`cast`).
    """

    moves_bias: ClassVar[bool] = False
    """Whether what it adds is merged into the module's bias."""
    keeps_bias: ClassVar[bool] = False
    """Whether it changes the module's output but for the bias that the base has, which it takes to
    be the whole of it."""
    shared: ClassVar[tuple[str, ...]] = ()
    """Parameters and modules of it that deltas in other blocks use, too: they belong to no block,
    and train whichever block's turn it is."""

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        """Make the parameters for a module; at their initial values the output must not change.

        Args:
            base: The module, plain or quantised; `features` tells its sizes.
            settings: As the piece says.
            before: The deltas of the same adapter that were made already, in the model's order.
                What is shared lives in the first of them alone; others reach it by `borrow`.
        """
        super().__init__()

    @staticmethod
    def check_model(model: nn.Module) -> None:
        """Raise InputError where a model cannot carry it, whatever the module: looked at when an
        adapter is made, and when one is loaded."""

    def around(
        self, call: Callable[..., torch.Tensor], *inputs: torch.Tensor, **others: Any
    ) -> torch.Tensor:
        """The module's new output, from a function that gives its own; other deltas of the same
        module may be inside of that function."""
        return self.change(call(*inputs, **others), *inputs)

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """The module's new output from its own output and inputs."""
        raise NotImplementedError

    def fold(self, base: nn.Module, sign: int) -> None:
        """Add (`sign` 1) or take away (-1) what was learned to the module's weights. Not defined
        where the mathematics allows no merge."""
        raise NotImplementedError

    def unfoldable(self, base: nn.Module) -> str | None:
        """Why `fold` has no place in this module, where it is defined; asked before any merge."""
        return None

    def borrow(self, name: str, other: Delta) -> None:
        """Keep another delta as the attribute `name` without owning its parameters."""
        object.__setattr__(self, name, other)


def undoing(scale: torch.Tensor) -> torch.Tensor:
    """The factors that take these away again.

    Raises:
        LowresError: Where one is 0.
    """
    if not scale.all():
        raise LowresError(
            "the adapter cannot be unmerged: it multiplies weights by exactly 0, which nothing "
            "gives back; load the base model again"
        )
    return 1 / scale


class Tap(Delta):
    """Keeps a module's input for a later delta of the same block, which takes it away again."""

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        self._kept: torch.Tensor | None = None

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        self._kept = inputs[0]
        return output

    def take(self) -> torch.Tensor:
        """What came in last; it is let go of."""
        kept, self._kept = self._kept, None
        assert kept is not None, "the tapped module was not called before"
        return kept


def shared_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Those that deltas inside a module share with deltas elsewhere."""
    for delta in module.modules():
        if isinstance(delta, Delta) and delta.shared:
            for name, parameter in delta.named_parameters():
                if name.partition(".")[0] in delta.shared:
                    yield parameter


def nearest(before: Sequence[Delta], kind: type[Delta]) -> Delta | None:
    """The last delta of a kind that was made."""
    return next((delta for delta in reversed(before) if isinstance(delta, kind)), None)


def first(before: Sequence[Delta], kind: type[Delta]) -> Delta | None:
    """The first delta of a kind that was made."""
    return next((delta for delta in before if isinstance(delta, kind)), None)


def features(base: nn.Module) -> tuple[int, int]:
    """Input and output features (i, o) of a linear layer of any make."""
    for given, made in (("in_features", "out_features"), ("nx", "nf")):
        if hasattr(base, given) and hasattr(base, made):
            return int(getattr(base, given)), int(getattr(base, made))
    raise TypeError(f"{type(base).__name__} is no linear layer")


def place(base: nn.Module) -> torch.device:
    """Where a module's weights lie."""
    return next(base.parameters()).device


def cast(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A value in another's type; under autocast operations choose their own."""
    return value if value.dtype == like.dtype else value.to(like.dtype)


def add_to_weight(base: Any, change_oi: torch.Tensor, sign: int) -> None:
    """Add a matrix (o, i) to a linear layer's weight, in the wider of the two types."""
    weight = base.weight.data
    change = change_oi if hasattr(base, "in_features") else change_oi.T
    wide = torch.promote_types(weight.dtype, change.dtype)
    weight.copy_(weight.to(wide).add(change.to(weight.device, wide), alpha=sign))
