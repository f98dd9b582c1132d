"""Methods that choose single weights by training rows before they are put into the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lowres.core.errors import InputError, Problem
from lowres.core.method import Method
from lowres.core.parts import part

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.learner import Learner
    from lowres.core.sample import Sample


@part
class Choosing(Method):
    """The choice is made where the weights lie after loading, and kept by checkpoints and by the
    adapter's files.

    An entry is one number of a matrix (o, i), named by its flat place `row * i + column`.
    """

    def observe(self, learner: Learner, sample: Sample) -> Mapping[str, torch.Tensor]:
        """A score for every entry that may be chosen, flat, by module path, in host memory. The
        model is left as it was found."""
        raise NotImplementedError

    def decide(self, scores: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The places of the entries that train, ascending; modules without any are left out."""
        raise NotImplementedError

    def expected(self, model: nn.Module, blocks: Blocks) -> Mapping[str, int]:
        """How many entries train in each module, as far as it is known before the data are: the sum
        over modules is what it will be."""
        raise NotImplementedError

    def put(self, model: nn.Module, blocks: Blocks, counts: Mapping[str, int]) -> nn.Module:
        """The model with room for so many entries in each module. Where they lie is said
        afterwards; meanwhile they are spread evenly."""
        raise NotImplementedError

    def apply(self, model: nn.Module, blocks: Blocks) -> nn.Module:
        raise self.needs_data()

    def needs_data(self) -> InputError:
        """What is said where no training rows are at hand."""
        text = (
            f"'{self.name}' chooses weights by training rows, and there are none beside a model "
            "alone; make it with lowres.build(recipe), or load an adapter that was saved"
        )
        return InputError("the recipe", [Problem("method", text)])
