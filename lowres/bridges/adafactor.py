"""transformers' Adafactor, made fit to be planned and resumed."""

from __future__ import annotations

from typing import Any

import torch
from transformers.optimization import Adafactor as _Adafactor


class Adafactor(_Adafactor):
    """Without a decision that waits for the device, and with states that keep their type."""

    @staticmethod
    def _get_lr(param_group: dict[str, Any], param_state: dict[str, Any]) -> Any:
        if not param_group["scale_parameter"]:
            return param_group["lr"]
        return param_state["RMS"].clamp(min=param_group["eps"][1]).mul_(param_group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch would round float32 states to the type of 16-bit parameters."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, state in state_dict["state"].items():
            place = parameters[number].device
            self.state[parameters[number]] = {
                k: v.to(place) if isinstance(v, torch.Tensor) else v for k, v in state.items()
            }
