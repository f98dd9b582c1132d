"""Adapters that PEFT has, put in by the name of their configuration."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowres.bridges.peft import inject, linear_targets
from lowres.core.delta import cast, features

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.blocks import Blocks


@dataclass(frozen=True)
class Linear:
    """A layer that an adapter goes to."""

    path: str
    inputs: int
    outputs: int


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
        adapted = inject(model, config, blocks)
    keep_types(adapted)
    return adapted


def keep_types(model: nn.Module) -> None:
    """Give the outputs of adapted layers with packed weights the type of their inputs.

    Some of PEFT's tuners give them the adapter's, float32, which layers in 16 bits do not take.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            if isinstance(base, Linear4bit | Linear8bitLt):
                module.register_forward_hook(_as_given)


def _as_given(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return cast(output, inputs[0])


def linears(model: nn.Module, blocks: Blocks, targets: str) -> list[Linear]:
    """The layers that these targets mean, as `linear_targets` takes them."""
    there = _meant(model, linear_targets(model, blocks, targets))
    return [Linear(path, *features(m)) for path, m in there]


def _meant(model: nn.Module, targets: Sequence[str]) -> list[tuple[str, nn.Module]]:
    return [
        (path, module)
        for path, module in model.named_modules()
        if any(path == target or path.endswith("." + target) for target in targets)
    ]


def _is_transposed(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
