"""PEFT's MiSS, RoAd, OFT and LoHa beside GPT-2's `Conv1D`, whose weight is (inputs, outputs).

PEFT 0.21 gives these to `nn.Linear` alone. Their forward passes ask nothing of how a weight lies;
where a layer is made, merged or unmerged, its base stands there as a Linear. Importing this module
makes the layers known to PEFT; files are PEFT's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from peft.tuners.loha.model import LoHaModel
from peft.tuners.miss.layer import MissLinear
from peft.tuners.miss.model import MissModel
from peft.tuners.oft.layer import Linear as OFTLinear
from peft.tuners.oft.model import OFTModel
from peft.tuners.road.layer import Linear as RoadLinear
from peft.tuners.road.model import RoadModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowres.bridges.loha import LoHaLinear
from lowres.bridges.peft import bare


class _AsLinear(Conv1D, nn.Linear):
    """What a Conv1D is for a moment."""

    nx: int
    nf: int

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return self.nx

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return self.nf


@contextlib.contextmanager
def _as_linear(base: Any) -> Iterator[None]:
    """While it lasts, a Conv1D passes for a Linear and its weight is (outputs, inputs)."""
    kind, weight = type(base), base.weight
    if kind is _AsLinear:
        yield
        return
    base.__class__ = _AsLinear
    weight.data = weight.data.t()
    try:
        yield
    finally:
        weight.data = weight.data.t().contiguous()
        base.__class__ = kind


_Layer: Any = object  # a layer of PEFT, in the classes below


class _Turned(_Layer):
    """A layer of PEFT for Linear, over a Conv1D."""

    def __init__(self, base_layer: Any, *args: Any, **kwargs: Any) -> None:
        with _as_linear(bare(base_layer)):
            super().__init__(base_layer, *args, **kwargs)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        with _as_linear(bare(self)):
            super().update_layer(*args, **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        with _as_linear(bare(self)):
            super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        with _as_linear(bare(self)):
            super().unmerge()


class MissConv1D(_Turned, MissLinear):
    """MiSS."""


class RoadConv1D(_Turned, RoadLinear):
    """RoAd."""


class OFTConv1D(_Turned, OFTLinear):
    """OFT."""


class LoHaConv1D(_Turned, LoHaLinear):
    """LoHa."""


def _knowing(make: Callable[..., Any], layer: type[_Turned]) -> Callable[..., Any]:
    def made(config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
        if isinstance(bare(target), Conv1D):
            return layer(target, adapter_name, config=config, **kwargs)
        return make(config, adapter_name, target, **kwargs)

    return made


_LAYERS: dict[Any, type[_Turned]] = {
    MissModel: MissConv1D, RoadModel: RoadConv1D, OFTModel: OFTConv1D, LoHaModel: LoHaConv1D,
}  # fmt: skip
for _tuner, _layer in _LAYERS.items():
    _tuner._create_new_module = staticmethod(_knowing(_tuner._create_new_module, _layer))
