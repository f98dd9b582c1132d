"""Train a narrow network beside the model, fed by its hidden states; backward leaves the model out.

Paper: LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning, Sung et al.
2022. https://arxiv.org/abs/2206.06522

Departs from the paper: weights are pruned by absolute sums alone, each block's by itself; heads
keep their size where the configuration lets them; the way up starts at zero, so that the first
outputs are exactly the model's, and its result is added before the final norm, without a norm of
its own; fused projections other than GPT-2's start random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, ClassVar

from lowres.core.method import Taxonomy
from lowres.core.parts import Circumstance, PositiveFloat, PositiveInt, part
from lowres.methods._adapter import Adapter

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


@part
class Ladder(Adapter):
    """`h_l = B_l(g h_{l-1} + (1 - g) D_l H_l)` beside each block with output H_l; B_l is a block of
    the same kind of width d / reduction, pruned from it; the model's last output is `H_L + U h_L`.

    Nothing of the model is kept for backward but each H_l once. An encoder-decoder has a ladder
    beside each of both, and the decoder's looks at the encoder's. Since backward leaves the model
    out, another adapter that works in the same blocks changes the outputs but gets no gradient.

    Args:
        reduction: The side network has d / reduction features (8 at least), and so with heads and
            feed-forward units.
        gate_temperature: Of g = sigmoid(a / temperature), a scalar of each rung that starts at 0.
        every: A rung at the last block and at each `every`-th before it.
    """

    taxonomy: ClassVar[Taxonomy] = "additive: other"
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-3, 3e-3)
    refuses: ClassVar[Mapping[Circumstance, str]] = {
        "rotating": (
            "until the way up at the last block has moved from zero no other rung has a gradient, "
            "so blocks cannot take turns; use another freezing, or lora"
        ),
        "tiled": (
            "nothing of the model's feed-forward parts is kept for backward, and those of the side "
            "network are narrow; drop the lever"
        ),
    }

    reduction: PositiveInt = 8
    gate_temperature: PositiveFloat = 0.1
    every: PositiveInt = 1

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        from lowres.bridges import sites
        from lowres.core.delta import Piece
        from lowres.methods._ladder import Rung

        readers = {a.block for a in sites.attentions(model, blocks) if a.cross}
        trained = [name for name in blocks.names if name in blocks.trained]
        stacks = [list(names) for _, names in groupby(trained, lambda n: n.rpartition(".")[0])]
        stacks = [names[:: -self.every][::-1] for names in stacks]
        shared = {"reduction": self.reduction, "gate_temperature": self.gate_temperature}
        found: dict[tuple[bool, ...], list[str]] = {}
        for names in stacks:
            last = names is stacks[-1]
            for name in names:
                ends = name == names[-1]
                kind = (name == names[0], ends and not last, ends and last, name in readers)
                found.setdefault(kind, []).append(name)
        roles = ("opens", "closes", "joins", "reads")
        return [
            Piece(Rung, names, shared | dict(zip(roles, kind, strict=True)))
            for kind, names in found.items()
        ]

    def uneven(self) -> str | None:
        return "the gradient goes from rung to rung and leaves out the blocks, by which it is told"
