"""PEFT's LoHa beside weights in 4 bits. Importing this module makes it known to PEFT.

PEFT 0.21 gives the change the shape of the stored weight, which in 4 bits is a column of bytes.
Files are PEFT's own, and load beside weights in 16 bits.
"""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.loha.layer import Linear, make_weight
from peft.tuners.loha.model import LoHaModel

from lowres.core.delta import features
from lowres.core.errors import LowresError


class LoHaLinear(Linear):
    """LoHa whose change is (outputs, inputs), however the weight is stored."""

    def get_delta_weight(
        self, adapter_name: str, *, apply_rank_dropout: bool = False
    ) -> torch.Tensor:
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        factors = (getattr(self, name)[adapter_name] for name in names)
        weight = make_weight(*factors, scale=torch.tensor(self.scaling[adapter_name]))
        if apply_rank_dropout:
            drawn = torch.rand(len(weight)) > self.rank_dropout[adapter_name]
            kept = drawn.to(weight).unsqueeze(1)
            weight = weight * (kept / kept.mean())
        return weight


class LoHaLinear4bit(LoHaLinear):
    """LoHa whose change is as large as the features of its layer say."""

    def create_adapter_parameters(self, adapter_name: str, r: int, shape: tuple[int, ...]) -> None:
        inputs, outputs = features(self.get_base_layer())
        super().create_adapter_parameters(adapter_name, r, (outputs, inputs))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise LowresError(
            "the adapter is not merged: the weights are quantised; load it on the base in 16 bits "
            "or more and merge there"
        )


# The first that fits is taken, and a layer in 4 bits is an nn.Linear too.
LoHaModel.layers_mapping = {Linear4bit: LoHaLinear4bit, **LoHaModel.layers_mapping}
