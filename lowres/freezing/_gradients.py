"""Gradients of every block's weights, one at a time, whatever the weights are held in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lowres.core.sample import untrained

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.example import Batch
    from lowres.core.learner import Learner
    from lowres.core.sample import Sample


def mean_norms(
    learner: Learner, sample: Sample, batches: Iterable[Batch], power: Literal[1, 2]
) -> torch.Tensor:
    """Mean over batches of a power of the norm of the gradient of a batch's mean loss, for each
    block, (L,) in float32.

    No two gradients are there at once; of a layer in few bits the gradient is that of the weights
    it stands for.
    """
    import torch

    device = next(learner.base.parameters()).device
    squares = torch.zeros(len(learner.blocks.names), device=device)
    total, count = torch.zeros_like(squares), 0
    for batch in batches:
        squares.zero_()
        with contextlib.ExitStack() as watching:
            watching.enter_context(untrained(learner.base))
            for place, name in enumerate(learner.blocks.names):
                block = learner.base.get_submodule(name)
                watching.enter_context(_watched(block, squares[place]))
            loss: Any = sample.loss(learner, {k: v.to(device) for k, v in batch.items()})
            loss.backward()
            del loss
        total.add_(squares.sqrt_() if power == 1 else squares)
        count += 1
    return total.div_(count)


def sizes(learner: Learner) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of weights and squared norm of the weights of each block, each (L,) in float32."""
    import torch

    from lowres.bridges import unpacking

    device = next(learner.base.parameters()).device
    counts = torch.zeros(len(learner.blocks.names), device=device)
    squares = torch.zeros_like(counts)
    for place, name in enumerate(learner.blocks.names):
        for weight in unpacking.weights_of(learner.base.get_submodule(name)):
            counts[place] += weight.numel()
            squares[place] += weight.float().square().sum()
    return counts, squares


@contextlib.contextmanager
def _watched(block: nn.Module, square: torch.Tensor) -> Iterator[None]:
    """Add the squares of the gradients that a backward pass makes in a block to a number."""
    handles: list[Any] = []

    def add(gradient: torch.Tensor) -> None:
        square.add_(gradient.float().square().sum())

    def born(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        add(parameter.grad)
        parameter.grad = None

    def through(_: nn.Module, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2)
        watch: Any = output.register_hook
        watch(lambda g: add(g.flatten(0, -2).t() @ x.to(g.dtype)))

    for parameter in block.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
            add_hook: Any = parameter.register_post_accumulate_grad_hook
            handles.append(add_hook(born))
    for module in block.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and not weight.is_floating_point():
            handles.append(module.register_forward_hook(through))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
