"""Take blocks out of a model, so that a few can stand for many that are alike."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lowres.bridges.blocks import renumber

BETWEEN, TOP = 2, 1
"""Of a run are traced the last block and two that show that what lies between repeats; at the
bottom the first, and the second where backward ends inside of the first."""


@dataclass(frozen=True)
class Run:
    """Consecutive blocks of one stack that are built alike.

    Args:
        length: How many there are.
        kept: The places that stay; the third and second to last repeat.
    """

    length: int
    kept: tuple[int, ...]


def runs_of(
    model: nn.Module, names: Sequence[str], roles: Mapping[str, Hashable], shorten: bool
) -> list[Run]:
    """Group blocks by structure: parameters, what of them is trained, and classes of modules.

    Args:
        model: The transformers model, with or without adapters.
        names: Paths of its blocks.
        roles: What is done with each; blocks of a run have the same.
        shorten: Keep a few blocks of a run, else all.
    """
    runs: list[Run] = []
    start = 0
    blocks = [model.get_submodule(name) for name in names]
    kinds = [
        (name.rpartition(".")[0], roles[name], _structure(b))
        for name, b in zip(names, blocks, strict=True)
    ]
    for at in range(1, len(names) + 1):
        if at < len(names) and kinds[at] == kinds[start]:
            continue
        length = at - start
        kept = tuple(range(start, at))
        bottom = 1 if _trains_at_once(blocks[start]) else 2
        if shorten and length > bottom + BETWEEN + TOP:
            own = range(start, start + bottom)
            kept = (*own, *_two_between(blocks, start + bottom - 1, at), at - 1)
        runs.append(Run(length, kept))
        start = at
    return runs


def _trains_at_once(block: nn.Module) -> bool:
    """Whether the first layer that multiplies with a matrix has something trained in it. Where it
    has not, what blocks share (rotary tables) dies in the backward pass of the second one."""
    for module in block.modules():
        layer = getattr(module, "base_layer", module)
        if isinstance(layer, nn.Linear | Conv1D):
            return any(p.requires_grad for p in module.parameters())
    return True


def _structure(block: nn.Module) -> Any:
    return (
        tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in block.named_parameters()),
        tuple(type(m).__name__ for m in block.modules()),
    )


def _two_between(blocks: Sequence[nn.Module], start: int, end: int) -> tuple[int, int]:
    """Two neighbours inside a run, of different attention types where it has several."""
    kinds = [_attention(b) for b in blocks[start:end]]
    for at in range(1, len(kinds) - 2):
        if kinds[at] != kinds[at + 1]:
            return start + at, start + at + 1
    return start + 1, start + 2


def _attention(block: Any) -> Any:
    return getattr(block, "attention_type", None) or getattr(block, "layer_type", None)


def shorten(model: Any, names: Sequence[str], kept: Sequence[int]) -> tuple[str, ...]:
    """Leave only the kept blocks in the model; returns their new paths."""
    stacks: dict[str, list[int]] = {}
    for place in kept:
        stacks.setdefault(names[place].rpartition(".")[0], []).append(place)
    out = []
    for stack, places in stacks.items():
        inside = [int(names[p].rpartition(".")[2]) for p in places]
        modules = model.get_submodule(stack)
        if len(inside) == len(modules):
            out += [names[p] for p in places]
            continue
        chosen = [modules[i] for i in inside]
        for module_list in (m for m in model.modules() if m is modules):
            module_list._modules = {str(i): block for i, block in enumerate(chosen)}
        for number, block in enumerate(chosen):
            out.append(f"{stack}.{number}")
            renumber(block, number)
        _tell_config(model.config, inside)
    return tuple(out)


def _tell_config(config: Any, inside: list[int]) -> None:
    """A decoder's config counts its layers and names the attention type of each."""
    if getattr(config, "is_encoder_decoder", False):
        return
    for key in ("layer_types", "mlp_layer_types"):
        kinds = getattr(config, key, None)
        if isinstance(kinds, list | tuple):
            setattr(config, key, [kinds[i] for i in inside])
    config.num_hidden_layers = len(inside)
