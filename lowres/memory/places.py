"""Which module is at work at every moment of a trace, in the backward pass too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from lowres.memory.trace import OUTSIDE
from lowres.memory.tracer import Tracer

_OUTPUT = "_lowres_output_of_block"


@contextlib.contextmanager
def following(tracer: Tracer, model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Keep `tracer.place` and `tracer.modules` up to date while the block runs.

    A block stays the place until another module outside of it is called: what is freed between two
    blocks belongs to the one before. In the backward pass the gradient of a block's output tells
    that its work begins.

    Args:
        blocks: Their position is their place.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    place_of = {id(m): i for i, block in enumerate(blocks) for m in block.modules()}
    block_ids = {id(block): i for i, block in enumerate(blocks)}
    containers = _containers(model, blocks)

    def set_place(place: int) -> Any:
        def hook(_: torch.Tensor) -> None:
            # Recomputing a block ends in the middle of a module, where all that is needed is there.
            tracer.modules.clear()
            tracer.place = place

        return hook

    def before(module: nn.Module, args: Any) -> None:
        if id(module) not in paths:
            return
        tracer.modules.append(paths[id(module)])
        if id(module) not in containers:
            tracer.place = place_of.get(id(module), OUTSIDE)
        at = block_ids.get(id(module))
        if at is not None and tracer.stage == "forward":
            given = _first(args)
            if given is not None and given.grad_fn is not None and not hasattr(given, _OUTPUT):
                # What the first block was given comes from outside of the blocks.
                given.register_hook(set_place(OUTSIDE))  # type: ignore[no-untyped-call]

    def after(module: nn.Module, _: Any, output: Any) -> None:
        if id(module) not in paths:
            return
        if tracer.modules:
            tracer.modules.pop()
        at = block_ids.get(id(module))
        if at is not None and tracer.stage == "forward":
            made = _first(output)
            if made is not None and made.requires_grad:
                setattr(made, _OUTPUT, at)
                made.register_hook(set_place(at))  # type: ignore[no-untyped-call]

    handles = [
        nn_module.register_module_forward_pre_hook(before),
        nn_module.register_module_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _containers(model: nn.Module, blocks: Sequence[nn.Module]) -> set[int]:
    """Modules that call blocks; their own operations leave the place as it is."""
    inside = {id(block) for block in blocks}
    return {
        id(module)
        for module in model.modules()
        if id(module) not in inside and any(id(m) in inside for m in module.modules())
    }


def _first(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, list | tuple):
        return next((v for v in value if isinstance(v, torch.Tensor)), None)
    return None
