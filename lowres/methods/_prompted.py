"""What soft prompts share: their length, where they are put, and what they cannot work beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lowres.core.errors import LowresError
from lowres.core.method import Method
from lowres.core.parts import Circumstance, PositiveInt, part

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks


@part
class Prompted(Method):
    """Trained vectors before the embeddings of each row.

    Args:
        length: P, how many; they take positions of the model and room in every attention.
    """

    mergeable: ClassVar[bool] = False
    starts_as_base: ClassVar[bool] = False
    refuses: ClassVar[Mapping[Circumstance, str]] = {
        "packed": "rows laid end to end would have one prompt for all of them, before the first; "
        "use 'length_bucketing', which pads little",
        "rotating": "the vectors lie below all blocks, so that backward goes through every block, "
        "whichever's turn it is; use freezing 'none', or a method that trains within blocks (lora)",
        "frozen_input": "the vectors stand where the embeddings are, so that backward goes through "
        "all blocks down to the input; use freezing 'none' or 'suffix', or a method that trains "
        "within blocks (lora)",
    }
    config: ClassVar[str]
    """The name of PEFT's configuration class."""

    length: PositiveInt = 20

    def settings(self) -> Mapping[str, Any]:
        """The fields of the configuration, without the length."""
        raise NotImplementedError

    def positions(self) -> int:
        return self.length

    def apply(self, model: nn.Module, blocks: Blocks) -> nn.Module:
        from lowres.bridges import prompts

        return prompts.inject(model, blocks, self.config, self.length, **self.settings())

    def merge(self, model: nn.Module) -> nn.Module:
        raise LowresError(
            f"'{self.name}' cannot be merged: vectors before the input are no change of a weight; "
            "keep the adapter beside the model"
        )
