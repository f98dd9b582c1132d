"""Rotate each layer's input by trained orthogonal blocks.

Paper: Controlling Text-to-Image Diffusion by Orthogonal Finetuning, Qiu et al. 2023.
https://arxiv.org/abs/2306.07280

Departs from the paper: the input is rotated and not the weight, and the Cayley transform's
inverse is a sum of five terms, as in the authors' later work
(https://arxiv.org/abs/2506.19847).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveInt, part
from lowres.methods._injected import Injected


@part
class Oft(Injected):
    """`y = W (R x)` with R block-diagonal, each block the Cayley transform of a trained
    skew-symmetric matrix from 0. PEFT sums five terms of its inverse, so R is near orthogonal only
    while it is near one: some hundred updates at the highest rate below take it away from that
    (`boft` inverts exactly).

    Args:
        block_size: Of each block; it divides every layer's inputs.
        targets: `paper` (queries and values), `all-linear`, or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    # The range of lora.
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-5, 1e-3)
    sample_fields: ClassVar[Mapping[str, Any]] = {"block_size": 8}
    config: ClassVar[str] = "OFTConfig"

    # As in the later work.
    block_size: PositiveInt = 32

    def settings(self) -> Mapping[str, Any]:
        return {"r": 0, "oft_block_size": self.block_size}

    def misfit(self, inputs: int, outputs: int) -> str | None:
        if inputs % self.block_size or self.block_size == 1:
            return (
                f"block_size {self.block_size} is 1 or does not divide its {inputs} inputs; choose "
                "another divisor"
            )
        return None
