"""What methods that PEFT has share: a configuration, and where it goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lowres.core.errors import InputError, Problem
from lowres.core.method import Method
from lowres.core.parts import part

if TYPE_CHECKING:
    from torch import nn

    from lowres.bridges.peft_configs import Linear
    from lowres.core.blocks import Blocks


@part
class Injected(Method):
    """An adapter of PEFT on linear layers.

    Args:
        targets: `paper` (queries and values), `all-linear`, or layer names joined by `+`.
    """

    mergeable: ClassVar[bool] = True
    config: ClassVar[str]
    """The name of PEFT's configuration class."""

    targets: str = "all-linear"

    def settings(self) -> Mapping[str, Any]:
        """The fields of the configuration."""
        raise NotImplementedError

    def misfit(self, inputs: int, outputs: int) -> str | None:
        """Why the fields do not suit a layer of so many features, with what would."""
        return None

    def apply(self, model: nn.Module, blocks: Blocks) -> nn.Module:
        from lowres.bridges.peft_configs import inject_named, linears

        for layer in linears(model, blocks, self.targets):
            self._stop_at(layer)
        adapted: nn.Module = inject_named(
            model, blocks, self.config, self.targets, **self.settings()
        )
        return adapted

    def _stop_at(self, layer: Linear) -> None:
        why = self.misfit(layer.inputs, layer.outputs)
        if why:
            problem = Problem("method", f"'{self.name}' at {layer.path}: {why}")
            raise InputError("the recipe", [problem])

    def merge(self, model: nn.Module) -> nn.Module:
        from lowres.bridges import peft

        return peft.merge(model)
