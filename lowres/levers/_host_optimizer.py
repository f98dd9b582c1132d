"""An optimizer whose states stay in host memory and whose updates are computed there."""

from __future__ import annotations

from typing import Any

import torch

from lowres.core import host
from lowres.core.in_backward import step_one


class HostOptimizer(torch.optim.Optimizer):
    """Takes the place of the optimizer it is given; one parameter after the other visits the host.

    Args:
        inner: Any optimizer that treats each parameter by itself. Its states are made where it
            meets a parameter: on the host.
        float32_master: Keep parameters of 16 bits in float32 on the host, as the state `master`.
    """

    def __init__(self, inner: torch.optim.Optimizer, float32_master: bool) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self._inner, self._float32_master = inner, float32_master
        self.state, self.param_groups = inner.state, inner.param_groups
        self._staging: list[torch.Tensor] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    with host.memory():
                        self._update(group, parameter)
                        for value in self.state[parameter].values():
                            if isinstance(value, torch.Tensor):
                                host.mark(value)
        self._staging.clear()

    def _update(self, group: dict[str, Any], parameter: torch.nn.Parameter) -> None:
        device_data, device_grad = parameter.data, parameter.grad
        assert device_grad is not None
        gradient = self._staged(1, device_grad)
        state = self.state.get(parameter) or {}
        master = state.get("master")
        if master is None and self._float32_master and parameter.element_size() < 4:
            master = torch.empty_like(device_data, dtype=torch.float32, device="cpu")
            master.copy_(device_data)
        if master is not None:
            data, gradient = master, gradient.float()
        else:
            data = self._staged(0, device_data)
        # torch wants parameter, gradient and states in one place.
        parameter.grad = None
        parameter.data = data
        parameter.grad = gradient
        try:
            step_one(self._inner, group, parameter)
        finally:
            parameter.grad = None
            parameter.data = device_data
            parameter.grad = device_grad
        if master is not None:
            self.state[parameter]["master"] = master
        # Through the staging buffer, so that a type is converted before it is sent.
        sent = data if master is None else self._staged(0, data, device_data.dtype)
        device_data.copy_(sent)

    def _staged(
        self, number: int, source: torch.Tensor, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A copy in one of two buffers of host memory, which hold the largest parameter.

        Two buffers, for torch keeps pinned memory for the next tensor of about that size, and the
        parameters have many.
        """
        if source.numel() == 1:  # which is a real number in a plan, beside a buffer that is not
            return source.detach().to("cpu", dtype or source.dtype, copy=True)
        if not self._staging:
            parameters = [p for group in self._inner.param_groups for p in group["params"]]
            floats = -(-max(p.nbytes for p in parameters) // 4)
            self._staging = [host.empty(floats, torch.float32, source.device) for _ in range(2)]
        there = self._staging[number].view(dtype or source.dtype)[: source.numel()]
        return there.view(source.shape).copy_(source)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """States come back as they were saved; torch would move them to their parameters' device
        and type.
        """
        empty = {"state": {}, "param_groups": state_dict["param_groups"]}
        self._inner.load_state_dict(empty)
        parameters = [p for group in self._inner.param_groups for p in group["params"]]
        for number, state in state_dict["state"].items():
            self._inner.state[parameters[number]] = {
                k: host.mark(v.cpu()) if isinstance(v, torch.Tensor) else v
                for k, v in state.items()
            }
        self.state, self.param_groups = self._inner.state, self._inner.param_groups
