"""What `adapter_config.json` holds for a method of lowres's own, and which modules it means."""

from __future__ import annotations

import enum
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft import PeftConfig
from peft.utils.other import EMBEDDING_LAYER_NAMES

from lowres.core.delta import Delta

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.delta import Piece


class LowresPeftType(str, enum.Enum):
    """Types that PEFT does not have. One serves all methods: the config names the method."""

    LOWRES_DELTA = "LOWRES_DELTA"


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

    target_modules: list[str] | set[str] | str | None = None
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
    if any(name in EMBEDDING_LAYER_NAMES for name in short):
        # PEFT saves the model's embeddings beside an adapter that names them so.
        return list(targets)
    return short if {p for p in paths if _meant(p, short)} == set(targets) else list(targets)
