"""What is alive between the steps of a run."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lowres.bridges.bitsandbytes import quantisation_states
from lowres.bridges.deepspeed import own_tensors
from lowres.bridges.streaming import streamed_tensors
from lowres.core.method import Method
from lowres.memory.live import tensors_of


def held(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, method: Method | None = None
) -> Iterator[torch.Tensor]:
    """Parameters, gradients, buffers, optimizer states, the method's state, what quantised layers
    hold beside, what streams between host and device, and what DeepSpeed holds."""
    yield from tensors_of(module, optimizer)
    if method is not None:
        yield from method.state(module).values()
    for _, tensor in quantisation_states(module):
        yield tensor
    yield from streamed_tensors(module)
    yield from own_tensors(optimizer)
