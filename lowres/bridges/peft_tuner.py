"""Deltas of lowres's own methods as real PEFT tuners.

PEFT's type enum is closed, so the tuner gets a member of an enum of its own in PEFT's mappings; a
`str` member hashes like its string, which is what PEFT reads from `adapter_config.json`. Importing
this module makes the type known; `import lowres` sees to it that it is imported with PEFT.
"""

from __future__ import annotations

import enum
import functools
import importlib
from collections.abc import Sequence
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

from lowres.core.delta import Delta
from lowres.core.errors import LowresError

if TYPE_CHECKING:
    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece


class LowresPeftType(str, enum.Enum):
    """Types that PEFT does not have. One serves all methods: the config names the method."""

    LOWRES_DELTA = "LOWRES_DELTA"


PREFIX = "lowres_delta_"


@dataclass
class DeltaConfig(PeftConfig):
    """What `adapter_config.json` holds for a lowres method.

    Args:
        method: The method's name.
        settings: Its hyperparameters, as in a recipe.
        parts: Which deltas go where: `delta` (import path `lowres.methods.<name>:<Class>`; nothing
            outside `lowres.methods` is ever imported from a file), `targets` (module paths or ends
            of them) and `settings`. Found from the model by the method where it is left out.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    method: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    parts: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LowresPeftType.LOWRES_DELTA
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)

    def classes(self) -> list[type[Delta]]:
        """The class of each part."""
        return [_class_of(part["delta"]) for part in self.parts]

    def place(self, pieces: Sequence[Piece], model: nn.Module) -> None:
        """Say which deltas go where; paths are shortened where their last name says as much."""
        paths = [name for name, _ in model.named_modules()]
        self.parts = [
            {
                "delta": f"{piece.delta.__module__}:{piece.delta.__qualname__}",
                "targets": _shortened(piece.targets, paths),
                "settings": dict(piece.settings),
            }
            for piece in pieces
        ]
        self.target_modules = {name for part in self.parts for name in part["targets"]}

    def make(self, path: str, base: nn.Module, before: Sequence[Delta]) -> dict[str, Delta]:
        """The deltas of one module, by their kind."""
        made: dict[str, Delta] = {}
        for part, delta in zip(self.parts, self.classes(), strict=True):
            if _meant(path, part["targets"]):
                name = delta.__name__.lower()
                if name in made:
                    raise ValueError(f"two parts put a {delta.__name__} at {path}")
                made[name] = delta(base, part["settings"], [*before, *made.values()])
        return made


def _class_of(path: str) -> type[Delta]:
    module, _, name = path.partition(":")
    if path != "lowres.core.delta:Tap" and not module.startswith("lowres.methods."):
        raise ValueError(f"'{path}' names no class of lowres.methods; the adapter is not ours")
    cls: type[Delta] = getattr(importlib.import_module(module), name)
    return cls


def _meant(path: str, targets: Sequence[str]) -> bool:
    return any(path == target or path.endswith("." + target) for target in targets)


def _shortened(targets: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Last names read better in adapter_config.json where they mean the same modules."""
    short = sorted({target.rpartition(".")[2] for target in targets})
    return short if {p for p in paths if _meant(p, short)} == set(targets) else list(targets)


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
        return tuple(self.lowres_delta_parts[adapter_name].values())

    def working(self) -> list[Any]:
        """The deltas that take part in a forward pass now."""
        if self.disable_adapters or self.merged:
            return []
        return [delta for name in self.active_adapters for delta in self.deltas(name)]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            for delta in self.deltas(name):
                delta.fold(self.get_base_layer(), 1)
            if name in self.lowres_delta_parts:
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        while self.merged_adapters:
            for delta in reversed(self.deltas(self.merged_adapters.pop())):
                delta.fold(self.get_base_layer(), -1)

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

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config: DeltaConfig = self.peft_config[adapter_name]
        if not config.parts:
            config.place(_found(config, model), model)
        self._made: list[Delta] = []
        return super().inject_adapter(model, adapter_name, *args, **kwargs)

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
        layer = target if isinstance(target, DeltaLayer) else DeltaLayer(target)
        made = peft_config.make(current_key, layer.get_base_layer(), self._made)
        self._made += made.values()
        layer.add(adapter_name, made, peft_config.inference_mode)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        # Not the base's: it looks for a weight, which a block has not. Of a wrapped block the
        # parts lie one further in.
        owner = parent.base_layer if isinstance(parent, DeltaLayer) else parent
        setattr(owner, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for config in self.peft_config.values():
            for delta in config.classes():
                if delta.fold is Delta.fold:
                    raise ValueError(
                        f"an adapter of '{config.method}' cannot be merged: what it adds is no "
                        "change of a weight; keep it beside the model"
                    )
        for path, module in self.model.named_modules():
            if isinstance(module, DeltaLayer):
                for delta in (d for name in self.peft_config for d in module.deltas(name)):
                    why = delta.unfoldable(module.get_base_layer())
                    if why is not None:
                        raise LowresError(f"the adapter is not merged: at {path}, {why}")


def _found(config: DeltaConfig, model: nn.Module) -> Sequence[Piece]:
    """Where a method's deltas go in a model that plain PEFT was given."""
    from lowres.bridges.blocks import map_blocks
    from lowres.core import registry

    if not config.method:
        raise ValueError("DeltaConfig wants a method: method='houlsby', settings={'reduction': 16}")
    cls: Any = registry.load("method", config.method)
    pieces: Sequence[Piece] = cls(**config.settings).pieces(
        model, map_blocks(model, [], True, False)
    )
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
