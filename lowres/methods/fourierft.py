"""Train a few entries of the spectrum of each weight's change.

Paper: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, Gao et al. 2024.
https://arxiv.org/abs/2405.03003

Departs from the paper: the spectrum starts at zero instead of Gaussian, so that the first
outputs are exactly the model's; frequencies are drawn evenly (the paper's default).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveFloat, PositiveInt, part
from lowres.methods._injected import Injected


@part
class Fourierft(Injected):
    """`y = W x + scale Re(ifft2(F)) x`, with F zero but for `frequencies` trained entries at places
    that a seed gives, the same in all layers of one shape. Every forward pass makes the change and
    its spectrum, each as large as the weight in float32.

    Args:
        frequencies: n, of each layer.
        scale: alpha of the paper.
        places_seed: Of the places of the entries.
        targets: `paper` (queries and values), `all-linear`, or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    # Appendix of the paper: 1e-3 to 1e-1.
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-3, 1e-1)
    sample_fields: ClassVar[Mapping[str, Any]] = {"frequencies": 32}
    config: ClassVar[str] = "FourierFTConfig"

    targets: str = "paper"
    frequencies: PositiveInt = 1000
    scale: PositiveFloat = 300.0
    places_seed: int = 777

    def settings(self) -> Mapping[str, Any]:
        return {
            "n_frequency": self.frequencies,
            "scaling": self.scale,
            "random_loc_seed": self.places_seed,
            "init_weights": True,
        }

    def misfit(self, inputs: int, outputs: int) -> str | None:
        if self.frequencies > inputs * outputs:
            return (
                f"{self.frequencies} frequencies are more than its {inputs} x {outputs} entries; "
                "set frequencies to at most that"
            )
        return None
