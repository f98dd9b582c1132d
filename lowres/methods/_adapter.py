"""What lowres's own methods share: deltas put into a model as a real PEFT adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lowres.core.method import Method
from lowres.core.parts import part, values

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class Adapter(Method):
    """A method made of `core.delta.Delta`s."""

    mergeable: ClassVar[bool] = False

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        """Which deltas go to which modules; raises InputError where there is no place for them."""
        raise NotImplementedError

    def apply(self, model: nn.Module, blocks: Blocks) -> nn.Module:
        from lowres.bridges import peft_tuner

        pieces = self.pieces(model, blocks)
        return peft_tuner.inject_pieces(model, blocks, self.name, values(self), pieces)

    def merge(self, model: nn.Module) -> nn.Module:
        from lowres.bridges import peft

        return peft.merge(model)
