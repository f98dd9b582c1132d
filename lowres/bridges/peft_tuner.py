"""Deltas of lowres's own methods as real PEFT tuners.

PEFT's type enum is closed, so the tuner gets a member of an enum of its own in PEFT's mappings; a
`str` member hashes like its string, which is what PEFT reads from `adapter_config.json`. Importing
this module makes the type known; `import lowres` sees to it that it is imported with PEFT.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import nn

import lowres.bridges.conv1d  # noqa: F401  (makes its own forms known, too)
from lowres.bridges.delta_config import DeltaConfig, LowresPeftType
from lowres.bridges.peft import unwrap_heads
from lowres.core.delta import Delta
from lowres.core.errors import LowresError

if TYPE_CHECKING:
    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


PREFIX = "lowres_delta_"


class DeltaLayer(nn.Module, BaseTunerLayer):
    """A module with the deltas of each adapter; whatever else is asked of it the module answers."""

    adapter_layer_names = ("lowres_delta_parts",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lowres_delta_parts = nn.ModuleDict({})
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "lowres_delta_parts"):
                raise
            return getattr(self.base_layer, name)

    def add(self, adapter_name: str, made: dict[str, Delta], inference_mode: bool) -> None:
        if not self.active_adapters:
            self._active_adapter = [adapter_name]
        self.lowres_delta_parts[adapter_name] = nn.ModuleDict(made)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def deltas(self, adapter_name: str) -> Sequence[Any]:
        """An adapter's deltas at this module."""
        if adapter_name not in self.lowres_delta_parts:
            return ()
        return tuple(cast(nn.ModuleDict, self.lowres_delta_parts[adapter_name]).values())

    def working(self) -> list[Any]:
        """The deltas that take part in a forward pass now."""
        if self.disable_adapters or self.merged:
            return []
        return [delta for name in self.active_adapters for delta in self.deltas(name)]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names):
            own = dict(base.named_parameters(recurse=False)) if safe_merge else {}
            before = {key: value.detach().clone() for key, value in own.items()}
            for delta in self.deltas(name):
                delta.fold(base, 1)
            if not all(value.isfinite().all() for value in own.values()):
                for key, value in own.items():
                    value.data.copy_(before[key])
                raise ValueError(f"the adapter {name} seems to be broken: merged weights have NaNs")
            if name in self.lowres_delta_parts:
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        while self.merged_adapters:
            for delta in reversed(self.deltas(self.merged_adapters[-1])):
                delta.fold(self.get_base_layer(), -1)
            self.merged_adapters.pop()

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        call: Any = self.base_layer
        for delta in self.working():
            call = functools.partial(delta.around, call)
        output: torch.Tensor = call(*args, **kwargs)
        return output


class DeltaTuner(BaseTuner):
    """Wraps the targeted modules in DeltaLayer."""

    prefix = PREFIX
    tuner_layer_cls = DeltaLayer
    target_module_mapping: dict[str, list[str]] = {}
    _to_merge: list[str] | None = None

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config: DeltaConfig = self.peft_config[adapter_name]
        wrapped = _wrapped(model)
        others = [p for *_, layer in wrapped for p in layer.lowres_delta_parts.parameters()]
        required = [p.requires_grad for p in others]
        # Methods and PEFT look for places by their paths in the plain model; PEFT passes over what
        # lies within a module that was wrapped before.
        self._layers = {id(layer.base_layer): layer for *_, layer in wrapped}
        self._made: list[Delta] = []
        for owner, name, layer in wrapped:
            owner._modules[name] = layer.base_layer
        try:
            if not config.parts:
                config.place(_found(config, model), model)
            for delta in config.classes():
                delta.check_model(model)
            with warnings.catch_warnings():
                # A delta beside an embedding changes no weight, and so nothing that is tied to it.
                warnings.filterwarnings("ignore", message=".*a tied layer is part of the adapter.*")
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            for owner, name, layer in wrapped:
                owner._modules[name] = layer
            self._layers.clear()
        for parameter, before in zip(others, required, strict=True):
            parameter.requires_grad_(before)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        self._to_merge = adapter_names
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        self._to_merge = adapter_names
        if merge:
            self._check_merge_allowed()
        unwrap_heads(self.model, trained=merge)
        for owner, name, layer in _wrapped(self.model):
            if merge:
                layer.merge(safe_merge, adapter_names)
            owner._modules[name] = layer.base_layer
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

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
        layer = self._layers.get(id(target)) or DeltaLayer(target)
        made = peft_config.make(current_key, layer.get_base_layer(), self._made)
        self._made += made.values()
        layer.add(adapter_name, made, peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.lowres_delta_parts[adapter_name].requires_grad_(False)
        # Of a module that was wrapped just now the parts lie one further in.
        owner = parent.base_layer if isinstance(parent, DeltaLayer) else parent
        setattr(owner, target_name, layer)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # The base's looks for the name beside the last word alone, where a delta has modules of its
        # own further in; a name left in the file binds the file to it, and transformers adds
        # another one.
        parts = DeltaLayer.adapter_layer_names[0]
        return key.replace(f".{parts}.{adapter_name}.", f".{parts}.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # Another adapter may wrap modules around or not: paths are compared without.
        plain = {cls._plain(key, adapter_name): key for key in model.state_dict()}
        return {plain.get(cls._plain(key, adapter_name), key): v for key, v in state_dict.items()}

    @classmethod
    def _plain(cls, key: str, adapter_name: str) -> str:
        key = cls._remove_adapter_name_from_key(key, adapter_name)
        return key.removeprefix("base_model.model.").replace(".base_layer.", ".")

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        names = self.active_adapters if self._to_merge is None else self._to_merge
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"no adapter {unknown} to merge; there are {[*self.peft_config]}")
        for config in (self.peft_config[name] for name in names):
            for delta in config.classes():
                if delta.fold is Delta.fold:
                    raise ValueError(
                        f"an adapter of '{config.method}' cannot be merged: what it adds is no "
                        "change of a weight; keep it beside the model"
                    )
        for path, module in self.model.named_modules():
            if not isinstance(module, DeltaLayer):
                continue
            deltas = [d for name in names for d in module.deltas(name)]
            if deltas:
                weight = getattr(module.get_base_layer(), "weight", None)
                if weight is not None and not weight.is_floating_point():
                    # A change would be added to the codes that stand for the weights.
                    raise LowresError(
                        f"the adapter is not merged: the weights at {path} are quantised; load it "
                        "on the base in 16 bits or more and merge there"
                    )
                for place, delta in enumerate(deltas):
                    why = delta.unfoldable(module.get_base_layer())
                    if delta.keeps_bias and any(other.moves_bias for other in deltas[:place]):
                        why = (
                            "one adapter moves the bias and another, around it, scales all but "
                            "the bias of the base; set them in the other order, or merge one alone"
                        )
                    if why is not None:
                        raise LowresError(f"the adapter is not merged: at {path}, {why}")


def _wrapped(model: nn.Module) -> list[tuple[nn.Module, str, DeltaLayer]]:
    """Every DeltaLayer with its owner and its name there."""
    return [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner._modules.items()
        if isinstance(child, DeltaLayer)
    ]


def _found(config: DeltaConfig, model: nn.Module) -> Sequence[Piece]:
    """Where a method's deltas go in a model that plain PEFT was given."""
    from lowres.bridges.blocks import map_blocks
    from lowres.core import registry

    if not config.method:
        raise ValueError("DeltaConfig wants a method: method='houlsby', settings={'reduction': 16}")
    cls: Any = registry.load("method", config.method)
    pieces: Sequence[Piece] = cls(**config.settings).pieces(model, map_blocks(model))
    return pieces


PEFT_TYPE_TO_CONFIG_MAPPING[LowresPeftType.LOWRES_DELTA] = DeltaConfig
PEFT_TYPE_TO_TUNER_MAPPING[LowresPeftType.LOWRES_DELTA] = DeltaTuner
PEFT_TYPE_TO_PREFIX_MAPPING[LowresPeftType.LOWRES_DELTA] = PREFIX


def inject_pieces(
    model: nn.Module, blocks: Blocks, method: str, settings: dict[str, Any], pieces: Sequence[Piece]
) -> nn.Module:
    """Put a method's deltas into the model; returns the PeftModel."""
    from lowres.bridges.peft import inject

    config = DeltaConfig(method=method, settings=settings)
    config.place(pieces, model)
    return inject(model, config, blocks)


def entries_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Module path to the places of the entries that an adapter changes there; what is written into
    them is the adapter's choice from then on."""
    return {
        path.removeprefix("base_model.model."): delta.entries
        for path, layer in model.named_modules()
        if isinstance(layer, DeltaLayer)
        for delta in layer.deltas("default")
        if hasattr(delta, "entries")
    }
