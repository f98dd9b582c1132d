"""Train vectors that stand before the embeddings of every row, made by a small network.

Paper: GPT Understands, Too, Liu et al. 2021. https://arxiv.org/abs/2103.10385

Departs from the paper: all vectors stand before the row, none between its parts; the network is an
MLP unless an LSTM is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from lowres.core.method import Taxonomy
from lowres.core.parts import Guard, PositiveInt, part
from lowres.methods._prompted import Prompted


@part
class PTuning(Prompted):
    """`[P; E(x)]` with P = MLP(p) or MLP(LSTM(p)) of trained p (length, D).

    What is saved is P, from which training cannot go on; a run is resumed from its checkpoints.

    Every block keeps its activations, and `length` columns more of them.

    Args:
        length: P, how many; they take positions of the model and room in every attention.
        encoder: `mlp` has three layers, `lstm` two in both directions and two layers behind.
        hidden: Inner width of the network.
    """

    taxonomy: ClassVar[Taxonomy] = "additive: soft prompts"
    # 1e-4 to 5e-4 in LoRETTA's comparison (https://arxiv.org/abs/2402.11417).
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-4, 5e-3)
    # What is saved was made of what was trained.
    waives: ClassVar[frozenset[Guard]] = frozenset({"saved"})
    config: ClassVar[str] = "PromptEncoderConfig"

    encoder: Literal["mlp", "lstm"] = "mlp"
    # With which LoRETTA trains 0.23 M in DeBERTa-base (the paper: as wide as the embeddings).
    hidden: PositiveInt = 128

    def settings(self) -> Mapping[str, Any]:
        return {
            "encoder_reparameterization_type": self.encoder.upper(),
            "encoder_hidden_size": self.hidden,
        }
