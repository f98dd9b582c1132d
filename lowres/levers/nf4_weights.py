"""Hold the frozen matrices of the blocks in 4 bits; unpack each while it is multiplied with.

Paper: QLoRA: Efficient Finetuning of Quantized LLMs, Dettmers et al. 2023.
https://arxiv.org/abs/2305.14314

Departs from the paper: it computes in `model.dtype` (the paper: bfloat16); the layers that are not
quantised keep that type too (the authors' code widens norms to float32).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from lowres.core.parts import Circumstance, part
from lowres.levers._weights import QuantisedWeights

if TYPE_CHECKING:
    from lowres.core.learner import LoadRequest


@part
class Nf4Weights(QuantisedWeights):
    """bitsandbytes' Linear4bit: 0.5 bytes a weight, and one scale for each 64 weights.

    Args:
        kind: `nf4` has its values where a normal distribution has its quantiles; `fp4` is a float
            of 4 bits.
        double_quantisation: Hold the scales in 8 bits: 0.016 bytes a weight instead of 0.063.
    """

    # A normal matrix is off by 0.092, in `fp4` by 0.122; small ones by a little more or less.
    tolerance: ClassVar[float] = 0.15
    brings: ClassVar[frozenset[Circumstance]] = frozenset({"quantised", "nf4"})

    kind: Literal["nf4", "fp4"] = "nf4"
    double_quantisation: bool = True

    def on_load(self, request: LoadRequest) -> LoadRequest:
        from lowres.bridges import bitsandbytes

        return bitsandbytes.load_in(4, request, kind=self.kind, double=self.double_quantisation)
