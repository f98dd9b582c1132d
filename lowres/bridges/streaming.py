"""Frozen weights in host memory that come to the device block by block, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lowres.bridges import bitsandbytes
from lowres.bridges.waiting_blocks import Slot, Streamed
from lowres.core import host

_MARK = "_lowres_streamed"


def stream(model: nn.Module, names: tuple[str, ...], resident: int) -> Streamed:
    """Keep the frozen parameters of the blocks in host memory.

    Args:
        model: The transformers model, with or without adapters.
        names: Paths of its blocks.
        resident: Blocks on the device at once.

    Raises:
        ValueError: For weights in 8 bits, which their layers hold a second time.
    """
    if getattr(model, "hf_device_map", None) is not None:
        del model.hf_device_map  # accelerate would refuse to train what was loaded elsewhere
    shared = _shared(model, names)
    found: list[tuple[nn.Module, list[Slot]]] = []
    for name in names:
        block = model.get_submodule(name)
        frozen = {id(p): p for p in block.parameters() if not p.requires_grad}
        slots = [s for key, p in frozen.items() if key not in shared for s in _slots(p)]
        if slots:
            _stay_behind(block, frozen.keys() - shared)
            found.append((block, slots))
    streamed = Streamed([slots for _, slots in found], resident)
    kind: host.Memory = "pinned" if host.pins(torch.device("cpu")) else "pageable"
    for number, (block, slots) in enumerate(found):
        for slot in slots:
            slot.host = host.mark(slot.host.to("cpu"), kind)
            slot.point(slot.host)
        setattr(block, _MARK, streamed)
        block.forward = _streaming(block.forward, streamed, number)
    return streamed


def streamed_of(model: nn.Module) -> Streamed | None:
    """What `stream` made of a model, if it did."""
    held = (module.__dict__.get(_MARK) for module in model.modules())
    return next((streamed for streamed in held if streamed is not None), None)


def streamed_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """The host's tensors and their copies on the device, of a model that streams."""
    streamed = streamed_of(model)
    if streamed is not None:
        yield from streamed.tensors()


def _shared(model: nn.Module, names: tuple[str, ...]) -> set[int]:
    """Parameters that more than one block, or a block and the rest of the model, hold."""
    holders: dict[int, set[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        holder = next((n for n in names if path.startswith(n + ".")), "")
        holders.setdefault(id(parameter), set()).add(holder)
    return {key for key, blocks in holders.items() if len(blocks) > 1}


def _slots(parameter: nn.Parameter) -> Iterator[Slot]:
    if bitsandbytes.is_eight_bit(parameter):
        raise ValueError("8-bit layers hold their weights a second time")
    yield Slot(parameter, "data", parameter.data)
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        places = [(state, "absmax"), (state, "code")]
        if state.nested:
            places += [(state, "offset"), (state.state2, "absmax"), (state.state2, "code")]
        yield from (Slot(owner, name, getattr(owner, name)) for owner, name in places)


def _stay_behind(block: nn.Module, frozen: set[int]) -> None:
    """Moving or converting the model leaves these parameters of the block alone."""

    def apply(fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        held = [
            (module._parameters, name, parameter)
            for module in block.modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in frozen
        ]
        for parameters, name, _ in held:
            parameters[name] = None
        try:
            type(block)._apply(block, fn, recurse)
        finally:
            for parameters, name, parameter in held:
                parameters[name] = parameter
        return block

    block._apply = apply  # type: ignore[method-assign]


def _streaming(forward: Callable[..., Any], streamed: Streamed, number: int) -> Callable[..., Any]:
    """A block's forward with its weights on the device, and again when gradients come back."""

    def called_back(_: torch.Tensor) -> None:
        streamed.use(number)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = _first((*args, *kwargs.values()))
        streamed.use(number, None if given is None else given.device)
        # What is saved beside goes to the hooks around this block: recomputing blocks has some.
        around = torch._C._autograd._top_saved_tensors_default_hooks(True)
        keep, give = around or (_itself, _itself)

        def pack(tensor: torch.Tensor) -> tuple[bool, Any]:
            place = streamed.pack(tensor)
            return (True, place) if place is not None else (False, keep(tensor))

        def unpack(packed: tuple[bool, Any]) -> torch.Tensor:
            streams, value = packed
            out: torch.Tensor = streamed.unpack(value) if streams else give(value)
            return out

        with saved_tensors_hooks(pack, unpack):
            out = forward(*args, **kwargs)
        made = _first(out if isinstance(out, list | tuple) else (out,))
        if made is not None and made.requires_grad:
            # Not every layer saves its weights where hooks see them: 4-bit ones do not.
            made.register_hook(called_back)
        return out

    return run


def _itself(value: Any) -> Any:
    return value


def _first(values: Any) -> torch.Tensor | None:
    return next((v for v in values if isinstance(v, torch.Tensor)), None)
