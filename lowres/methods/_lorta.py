"""One low-rank tensor for all attentions of a model. Legend: N rows, D hidden, H heads, E size of a
head, L attentions, R rank.

The change of a matrix is a product of A (D, R) and a thin (H E, R) made of the head's, the
matrix's and the attention's vectors and of B; the dense change is made for merging alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lowres.core.delta import Delta, add_to_weight, cast, features, first, place
from lowres.core.recompute import recompute

MATRICES = ("query", "key", "value", "out")


class Factors(nn.Module):
    """What all attentions share: A (D, R), B (R, E) from zero, and vectors (R) for each head,
    matrix and attention, Kaiming-uniform as in the authors' code."""

    def __init__(self, settings: Mapping[str, Any], device: torch.device) -> None:
        super().__init__()
        rank = int(settings["rank"])

        def parameter(*shape: int) -> nn.Parameter:
            value = torch.zeros(shape, device=device)
            if device.type != "meta":
                nn.init.kaiming_uniform_(value, a=5**0.5)
            return nn.Parameter(value)

        self.A = parameter(int(settings["width"]), rank)
        self.B = nn.Parameter(torch.zeros(rank, int(settings["head_size"]), device=device))
        self.heads = parameter(int(settings["heads"]), rank)
        self.matrices = parameter(len(MATRICES), rank)
        self.attentions = parameter(int(settings["attentions"]), rank)


class AttentionTensor(Delta):
    """`y + (alpha / rank) dW x`, dW a slice of the tensor; heads lie on the output side of queries,
    keys and values, and on the input side of the output projection.

    Settings: `matrix` (of MATRICES), `rank`, `alpha`, `width` (D), `head_size` (E), `heads` (H),
    `attentions` (L). Where keys and values have fewer heads, they take the first of H.
    """

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        super().__init__(base, settings, before)
        self.matrix = MATRICES.index(settings["matrix"])
        self._scale = float(settings["alpha"]) / int(settings["rank"])
        of_heads = features(base)[0 if settings["matrix"] == "out" else 1]
        self._heads = of_heads // int(settings["head_size"])
        # Deltas are made in the model's order, so the count says which attention this is.
        same = [d for d in before if isinstance(d, AttentionTensor) and d.matrix == self.matrix]
        self._attention = len(same)
        self._owner: AttentionTensor
        owner = first(before, AttentionTensor)
        if owner is None:
            self.factors = Factors(settings, place(base))
        self.borrow("_owner", owner or self)

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        added = recompute(self._added, inputs[0], parameters=self._owner.factors.parameters())
        return output + cast(added, output)

    def _added(self, x: torch.Tensor) -> torch.Tensor:
        x, thin = cast(x, self._owner.factors.A), self._thin()
        if self.matrix == MATRICES.index("out"):
            return x @ thin @ self._owner.factors.A.T * self._scale
        return x @ self._owner.factors.A @ thin.T * self._scale

    def _thin(self) -> torch.Tensor:
        own = self._owner.factors
        c_HR = (
            own.heads[: self._heads] * own.matrices[self.matrix] * own.attentions[self._attention]
        )
        return (c_HR[:, None] * own.B.T).flatten(0, 1)

    def fold(self, base: nn.Module, sign: int) -> None:
        with torch.no_grad():
            change = self._thin() @ self._owner.factors.A.T * self._scale
            add_to_weight(base, change.T if self.matrix == MATRICES.index("out") else change, sign)
