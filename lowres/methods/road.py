"""Rotate and stretch pairs of each layer's outputs.

Paper: 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and
Composability, Liao and Monz 2024. https://arxiv.org/abs/2409.00119

Departs from the paper: pairs are of features half a group apart, as in PEFT (the paper:
neighbours), which is the same up to the order of features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from lowres.core.method import Taxonomy
from lowres.core.parts import PositiveInt, part
from lowres.methods._injected import Injected


@part
class Road(Injected):
    """`y = R (W x + b)`, R of 2 x 2 blocks `a ((cos t, -sin t), (sin t, cos t))`, t from 0 and
    a from 1; the adapter's work is elementwise.

    Args:
        variant: Angles and scales for each pair: `road_1` one, `road_2` two, `road_4` four.
        group_size: Features in whose halves pairs lie; it divides every layer's outputs.
        targets: `paper` (queries and values), `all-linear`, or layer names joined by `+`.
    """

    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    # Appendix of the paper: 1e-3 to 5e-3.
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-3, 1e-2)
    sample_fields: ClassVar[Mapping[str, Any]] = {"group_size": 8}
    config: ClassVar[str] = "RoadConfig"

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    # As in PEFT.
    group_size: PositiveInt = 64

    def settings(self) -> Mapping[str, Any]:
        return {"variant": self.variant, "group_size": self.group_size}

    def misfit(self, inputs: int, outputs: int) -> str | None:
        if outputs % 2:
            return f"it rotates pairs, and the {outputs} outputs are odd; leave the layer out"
        if self.group_size % 2 or outputs % self.group_size:
            return (
                f"group_size {self.group_size} is odd or does not divide its {outputs} outputs; "
                f"set it to {_even_divisor(outputs, self.group_size)}"
            )
        return None


def _even_divisor(number: int, most: int) -> int:
    """The largest even one up to a bound; 2 where there is none."""
    return next((n for n in range(most, 2, -1) if n % 2 == 0 and number % n == 0), 2)
