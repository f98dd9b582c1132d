"""The work of one operation: arithmetic and bytes moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lowres.core import host
from lowres.memory.trace import Cost

_MOVES_NOTHING = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty",
                  "new_empty_strided", "detach", "alias", "lift_fresh"}  # fmt: skip
"""Operations that only give memory or another view of it, beside those that say so themselves."""


def handled_bytes(arguments: Any) -> int:
    """Of all tensors that an operation takes and gives."""
    return sum(_bytes(t) for t in _tensors(arguments))


def cost_of(
    func: Any,
    args: Any,
    kwargs: Any,
    out: Any,
    place: int,
    stage: str,
    is_fixed: Callable[[torch.Tensor], bool],
) -> Cost | None:
    """What an ATen operation computes and moves; None for views and for memory not yet written.

    Args:
        is_fixed: Whether a tensor is held between steps.
    """
    tensors = _tensors((args, kwargs, out))
    if not tensors or func.is_view or func._opname in _MOVES_NOTHING:
        return None
    if func._opname == "copy_":
        tensors = tensors[1:]  # what is overwritten is not read
    count = flop_registry.get(func.overloadpacket)
    flops = int(count(*args, **kwargs, out_val=out)) if count is not None else 0
    if func.namespace == "bitsandbytes":
        flops = _packed_product(func._opname, args)
    kind = "traffic"
    if flops:
        kind = "attention" if "attention" in func._opname else "products"
    fixed = sum(_bytes(t) for t in tensors if is_fixed(t))
    moved = sum(_bytes(t) for t in tensors)
    return Cost(place, stage, kind, tensors[0].dtype, flops, moved, fixed)


def over_bus(cost: Cost, copies: bool, arguments: Any) -> list[Cost]:
    """A cost with what the bus carries for it.

    All of it inside of `host.memory()` and of a copy between the two, a copy once: it was counted
    read and written. Where the device works on host memory its pages come and, since optimizers
    write to them, go back, unless there is room to keep them: that is of the kind `paging`.
    """
    between = copies and len({host.holds(t) for t in _tensors(arguments)}) == 2
    if host.allocating() or between:
        carried = cost.bytes // (2 if copies else 1)
        fixed = min(cost.fixed_bytes, carried)
        return [replace(cost, kind="transfer", bytes=carried, fixed_bytes=fixed)]
    paged = 0 if copies else sum(_bytes(t) for t in _tensors(arguments) if host.holds(t))
    there = [replace(cost, kind="paging", flops=0, bytes=2 * paged)] if paged else []
    return [*there, cost]


def _packed_product(name: str, args: Any) -> int:
    """Of a product with a 4-bit or 8-bit matrix; nothing for other operations."""
    if name == "gemm_4bit":
        return 2 * int(args[0].numel()) * int(args[2][0])
    if name == "int8_mixed_scaled_mm":
        return 2 * int(args[0].numel()) * int(args[2].shape[0])
    return 0


def _tensors(arguments: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
