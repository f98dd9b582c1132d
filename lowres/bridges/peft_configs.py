"""Adapters that PEFT has, put in by the name of their configuration."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowres.bridges.peft import inject, linear_targets
from lowres.core.delta import features

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks


@dataclass(frozen=True)
class Linear:
    """A layer that an adapter goes to.

    Args:
        transposed: Whether it holds its weight as (inputs, outputs).
    """

    path: str
    inputs: int
    outputs: int
    transposed: bool


def inject_named(
    model: nn.Module, blocks: Blocks, name: str, targets: str | Sequence[str], **fields: Any
) -> Any:
    """Put one of PEFT's adapters into the model; returns the PeftModel.

    Args:
        name: Of PEFT's configuration class, such as `VeraConfig`.
        targets: As `linear_targets` takes them, or module paths.
        fields: Of the configuration.
    """
    import peft

    if isinstance(targets, str):
        targets = linear_targets(model, blocks, targets)
    cls = getattr(peft, name)
    if "fan_in_fan_out" in cls.__dataclass_fields__:
        fields["fan_in_fan_out"] = any(_is_transposed(m) for _, m in _meant(model, targets))
    config = cls(target_modules=list(targets), **fields)
    with warnings.catch_warnings():
        # That ranks of AdaLoRA are called otherwise.
        warnings.simplefilter("ignore", UserWarning)
        return inject(model, config, blocks)


def linears(model: nn.Module, blocks: Blocks, targets: str) -> list[Linear]:
    """The layers that these targets mean, as `linear_targets` takes them."""
    there = _meant(model, linear_targets(model, blocks, targets))
    return [Linear(path, *features(m), _is_transposed(m)) for path, m in there]


def _meant(model: nn.Module, targets: Sequence[str]) -> list[tuple[str, nn.Module]]:
    return [
        (path, module)
        for path, module in model.named_modules()
        if any(path == target or path.endswith("." + target) for target in targets)
    ]


def _is_transposed(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
