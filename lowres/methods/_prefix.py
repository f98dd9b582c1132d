"""Trained keys and values of an attention. Legend: P their number, D hidden, K heads, E width of a
head, M inner width of the network that makes them, B rows, T tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lowres.core.delta import Delta, cast, features, place


class KeyValuePrefix(Delta):
    """P keys and values before those of an attention: a table, or what a network makes of vectors
    that the attentions of a group share.

    The vectors (P, D) and the network's first layer lie in the group's first delta; of its last
    layer each block holds its own slice, so that the gradient of one is not as large as that of
    all. The output of the layer where it sits stays as it is.

    Settings: `length` (P), `mlp` (M, None for a table), `group`, `heads` (K), `width` (E).
    """

    shared = ("vectors", "down")

    def __init__(
        self, base: nn.Module, settings: Mapping[str, Any], before: Sequence[Delta] = ()
    ) -> None:
        from lowres.bridges import attention

        super().__init__(base, settings, before)
        attention.watch()
        self.group = settings["group"]
        self._shape = (int(settings["length"]), 2, int(settings["heads"]), int(settings["width"]))
        length, made = self._shape[0], 2 * self._shape[2] * self._shape[3]
        device, middle = place(base), settings["mlp"]
        if middle is None:
            self.table = nn.Parameter(torch.randn(length, made, device=device))
            return
        root = next((d for d in before if _is_of(d, self.group)), None)
        self._root: KeyValuePrefix | None = None
        if root is None:
            hidden = features(base)[0]
            self.vectors = nn.Parameter(torch.randn(length, hidden, device=device))
            self.down = nn.Linear(hidden, middle, device=device)
        else:
            self.borrow("_root", root)
        self.up = nn.Linear(middle, made, device=device)

    @staticmethod
    def check_model(model: nn.Module) -> None:
        from lowres.bridges import attention

        attention.stop_unless_served(model)

    def made(self) -> torch.Tensor:
        """Keys and values side by side, (P, 2 K E)."""
        if hasattr(self, "table"):
            return self.table
        root = self._root or self
        hidden_PM = torch.tanh(root.down(root.vectors))
        up: torch.Tensor = self.up(cast(hidden_PM, self.up.weight))
        return up

    def keys_values(self, rows: int) -> torch.Tensor:
        """Keys and values, (2, B, K, P, E)."""
        made_2KPE = self.made().view(self._shape).permute(1, 2, 0, 3)
        return made_2KPE[:, None].expand(-1, rows, -1, -1, -1)

    def change(self, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output


def _is_of(delta: Delta, group: str) -> bool:
    return isinstance(delta, KeyValuePrefix) and delta.group == group


@torch.no_grad()
def flatten(model: Any) -> None:
    """Put tables in the place of the networks of every prefix: the same outputs, fewer parameters.

    Further training goes over the tables; an optimizer made before knows nothing of them.

    Args:
        model: A PeftModel with adapters that have prefixes; what is saved of it is flat, too.
    """
    prefixes = [m for m in model.modules() if isinstance(m, KeyValuePrefix) and hasattr(m, "up")]
    tables = [prefix.made().clone() for prefix in prefixes]
    for prefix, table in zip(prefixes, tables, strict=True):
        trained = prefix.up.weight.requires_grad
        for name in ("up", "down", "vectors"):
            if hasattr(prefix, name):
                delattr(prefix, name)
        object.__setattr__(prefix, "_root", None)
        prefix.table = nn.Parameter(table, requires_grad=trained)
    for config in model.peft_config.values():
        for settings in [config.settings, *(part["settings"] for part in config.parts)]:
            if "mlp" in settings:
                settings["mlp"] = None
