"""Tells `Fetches` which module is at work, for a plan, as DeepSpeed's ZeRO stage 3 learns it.

Source: deepspeed 0.19, runtime/zero/parameter_offload.py (`setup_zero_stage3_hooks`,
`_register_deepspeed_module`, `ZeROOrderedDict`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lowres.bridges.deepspeed_fetches import Fetches, ReadParameters
from lowres.bridges.deepspeed_parts import Part, gather_now


class Hooks:
    """On every module of a model, before and after its forward and its backward pass."""

    def __init__(
        self, model: torch.nn.Module, fetches: Fetches, parts: dict[int, Part], processes: int
    ) -> None:
        self._model, self._fetches = model, fetches
        self._parts, self._processes = parts, processes
        self._stack: list[torch.nn.Module] = [model]
        self._training = False
        model.register_forward_pre_hook(self._begin)
        for module in model.modules():
            module._parameters = ReadParameters(module._parameters, self)
        self._register(model)
        model.register_forward_hook(self._end)

    def read(self, parameter: torch.Tensor) -> None:
        """A parameter was asked for by name."""
        part = self._parts.get(id(parameter)) if self._training else None
        if part is not None and part.state == "apart":
            self._fetches.read_by(self._stack[-1], part)
            gather_now([part], self._processes)

    def _begin(self, module: torch.nn.Module, _: Any) -> None:
        self._training = module.training
        self._fetches.begin()

    def _end(self, *_: Any) -> None:
        self._training = False

    def _register(self, module: torch.nn.Module) -> None:
        for child in module.children():
            self._register(child)
        forward = _Counted(lambda: self._fetches.fetch(module, forward=False))
        backward = _Counted(lambda: self._fetches.release(module, forward=False))

        @torch.no_grad()
        def before(*_: Any) -> None:
            self._stack.append(module)
            self._fetches.fetch(module, forward=True)

        @torch.no_grad()
        def after(*_: Any) -> None:
            self._stack.pop()
            self._fetches.release(module, forward=True)

        def on_inputs(_: Any, inputs: Any) -> Any:
            backward.left = 0
            return _on_tensors(lambda t: _Entered.apply(t, backward), inputs)

        def on_outputs(_: Any, inputs: Any, output: Any) -> Any:
            return _on_tensors(lambda t: _Left.apply(t, forward), output)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
        module.register_forward_hook(on_outputs)
        module.register_forward_pre_hook(on_inputs)


class _Counted:
    """What to do in a backward pass, and how many tensors are still to come."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act
        self.left = 0


class _Left(torch.autograd.Function):
    """An output: before the gradient of it is worked with, the module's parameters are fetched."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, counted: _Counted) -> torch.Tensor:
        ctx.counted = counted
        counted.left += 1
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        if ctx.counted.left > 0:
            ctx.counted.act()
            ctx.counted.left -= 1
        return *gradients, None


class _Entered(torch.autograd.Function):
    """An input: once all gradients of them are there, the module's parameters are let go."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, counted: _Counted) -> torch.Tensor:
        ctx.counted = counted
        if given.requires_grad:
            counted.left += 1
        return given.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.counted.left -= 1
        if ctx.counted.left == 0:
            ctx.counted.act()
        return *gradients, None


def _on_tensors(act: Callable[[torch.Tensor], Any], value: Any) -> Any:
    if isinstance(value, tuple | list):
        touched = [_on_tensors(act, one) for one in value]
        return type(value)(*touched) if hasattr(value, "_fields") else type(value)(touched)
    if isinstance(value, dict):
        for key in value:
            value[key] = _on_tensors(act, value[key])
        return value
    return act(value) if isinstance(value, torch.Tensor) else value
