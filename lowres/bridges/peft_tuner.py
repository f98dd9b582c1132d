"""Deltas of lowres's own methods as real PEFT tuners.

PEFT's type enum is closed, so each tuner gets a member of an enum of its own in PEFT's mappings; a
`str` member hashes like its string, which is what PEFT reads from `adapter_config.json`. Importing
this module makes the types known: do it before `PeftModel.from_pretrained` reads such an adapter.
"""

from __future__ import annotations

import enum
import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import nn

if TYPE_CHECKING:
    from lowres.core.blocks import Blocks
    from lowres.core.delta import Delta


class LowresPeftType(str, enum.Enum):
    """Types that PEFT does not have. One serves all deltas: the config names the class."""

    LOWRES_DELTA = "LOWRES_DELTA"


PREFIX = "lowres_delta_"


@dataclass
class DeltaConfig(PeftConfig):
    """What `adapter_config.json` holds for a lowres method.

    Args:
        delta: Import path of the Delta class, `lowres.methods.<name>:<Class>`; nothing outside
            `lowres.methods` is ever imported from a file.
        settings: The method's hyperparameters.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    delta: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LowresPeftType.LOWRES_DELTA
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)

    def delta_class(self) -> type[Delta]:
        module, _, name = self.delta.partition(":")
        if not module.startswith("lowres.methods."):
            raise ValueError(
                f"'{self.delta}' names no class of lowres.methods; the adapter is not ours"
            )
        cls: type[Delta] = getattr(importlib.import_module(module), name)
        return cls


class DeltaLayer(nn.Module, BaseTunerLayer):
    """A module with one Delta for each adapter."""

    adapter_layer_names = ("lowres_delta_parts",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: DeltaConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lowres_delta_parts = nn.ModuleDict({})
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.add(adapter_name, config)

    def add(self, adapter_name: str, config: DeltaConfig) -> None:
        base = self.get_base_layer()
        self.lowres_delta_parts[adapter_name] = config.delta_class()(base, config.settings)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lowres_delta_parts:
                self.lowres_delta_parts[name].fold(self.get_base_layer(), 1)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        while self.merged_adapters:
            self.lowres_delta_parts[self.merged_adapters.pop()].fold(self.get_base_layer(), -1)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        for name in self.active_adapters:
            if name in self.lowres_delta_parts:
                output = self.lowres_delta_parts[name].change(output, *args)
        return output


class DeltaTuner(BaseTuner):
    """Wraps the targeted modules in DeltaLayer."""

    prefix = PREFIX
    tuner_layer_cls = DeltaLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _create_and_replace(
        self,
        peft_config: DeltaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, DeltaLayer):
            target.add(adapter_name, peft_config)
            return
        layer = DeltaLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


PEFT_TYPE_TO_CONFIG_MAPPING[LowresPeftType.LOWRES_DELTA] = DeltaConfig
PEFT_TYPE_TO_TUNER_MAPPING[LowresPeftType.LOWRES_DELTA] = DeltaTuner
PEFT_TYPE_TO_PREFIX_MAPPING[LowresPeftType.LOWRES_DELTA] = PREFIX


def inject_delta(
    model: nn.Module,
    blocks: Blocks,
    delta: type[Delta],
    targets: list[str],
    settings: dict[str, Any] | None = None,
) -> nn.Module:
    """Put a Delta beside each targeted module; returns the PeftModel."""
    from lowres.bridges.peft import inject

    config = DeltaConfig(
        target_modules=targets,
        delta=f"{delta.__module__}:{delta.__qualname__}",
        settings=settings or {},
    )
    return inject(model, config, blocks)
