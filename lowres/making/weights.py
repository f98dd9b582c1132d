"""Whether the weights lie in memory as was asked for, and what was done to them after loading."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowres.bridges import narrow, peft
from lowres.bridges.bitsandbytes import (
    asked_bytes,
    element_count,
    is_quantised,
    quantisation_state,
)
from lowres.core.errors import InputError, LowresError, Problem
from lowres.core.units import format_bytes

if TYPE_CHECKING:
    from lowres.core.blocks import Blocks
    from lowres.core.learner import LoadRequest


def stop_at_wide(
    model: nn.Module, request: LoadRequest, blocks: Blocks, fresh: Container[str]
) -> None:
    """Compare the bytes of each matrix with those that were asked for.

    Args:
        fresh: Names of parameters that were made anew.

    Raises:
        LowresError: Naming the first matrix that takes more.
        InputError: When float16 cannot hold a weight of the checkpoint.
    """
    config = request.options.get("quantization_config")
    alone = narrow.left_alone(model)
    inside = tuple(f"{name}." for name in blocks.names)
    narrowed = {name for name, _ in narrow.matrices(model, fresh)} if request.matrices else set()
    module: Any
    for path, module in model.named_modules():
        linear = narrow.is_linear(module)
        if not linear and not isinstance(module, nn.Embedding) or alone & set(path.split(".")):
            continue
        name = f"{path}.weight"
        if config is not None and linear and path.startswith(inside):
            _stop_if_unpacked(path, module, config)
            continue
        wanted = getattr(torch, (name in narrowed and request.matrices) or request.dtype)
        found = module.weight.element_size()
        _stop_if(found > wanted.itemsize, path, module, found, wanted.itemsize)
        if wanted == torch.float16 and not math.isfinite(
            float(torch.linalg.vector_norm(module.weight.detach(), math.inf))
        ):
            why = f"{name} has weights beyond float16's 65504; use bfloat16 (bf16_weights)"
            raise InputError("the recipe", [Problem("model.checkpoint", why)])


def _stop_if_unpacked(path: str, module: Any, config: Any) -> None:
    count, asked = element_count(module.weight), asked_bytes(module, config)
    held = sum(t.nbytes for t in (module.weight, *quantisation_state(module)))
    wide = held > asked or not is_quantised(module.weight)
    _stop_if(wide, path, module, held / count, asked / count)
    # Of small matrices the code book for the scales takes more than it saves.
    double = config.load_in_4bit and config.bnb_4bit_use_double_quant
    if double and not module.weight.quant_state.nested:
        raise LowresError(
            f"the scales of {path} are held in 32 bits where 8 were asked for "
            "(double_quantisation), so the plan and the memory of this run would be wrong; set "
            "double_quantisation to false, or install the bitsandbytes of setup.cfg"
        )


def _stop_if(wide: bool, path: str, module: Any, found: float, asked: float) -> None:
    if wide:
        raise LowresError(
            f"{path} takes {found:.2f} bytes a weight where {asked:.2f} were asked for: "
            f"{type(module).__name__} was not converted when it was loaded, so the plan and the "
            "memory of this run would be wrong; drop the lever that holds weights in fewer bits"
        )


def types_of(model: nn.Module) -> dict[str, torch.dtype]:
    """Type of each parameter and buffer by its name in the plain model, adapters left out."""
    return {name: tensor.dtype for name, tensor in _by_plain_name(model)}


def _by_plain_name(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    inside = peft.unwrap_adapted(model)
    for name, tensor in (*inside.named_parameters(), *inside.named_buffers()):
        yield name.replace("base_layer.", "").replace("original_module.", ""), tensor


def casts(loaded: Mapping[str, torch.dtype], model: nn.Module) -> tuple[str, list[str]] | None:
    """What has another type than when it was loaded: the sum of its bytes now, and each tensor with
    its own; None where nothing has.
    """
    changed, size_bytes = [], 0
    for name, tensor in _by_plain_name(model):
        was = loaded.get(name, tensor.dtype)
        if tensor.dtype != was:
            kinds = [str(kind).removeprefix("torch.") for kind in (was, tensor.dtype)]
            size = format_bytes(tensor.nbytes)
            changed.append(f"{name} ({kinds[0]} to {kinds[1]}, {size})")
            size_bytes += tensor.nbytes
    if not changed:
        return None
    return f"cast: {len(changed)} tensors, {format_bytes(size_bytes)}: ", changed
