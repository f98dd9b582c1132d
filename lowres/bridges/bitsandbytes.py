"""The door to bitsandbytes, for weights in 4 and 8 bits; `eight_bit_states` has its optimizers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lowres.bridges import bitsandbytes_cpu, quiet
from lowres.bridges.narrow import as_linear_takes

_logger = logging.getLogger("bitsandbytes")
_level = _logger.level
_logger.setLevel(logging.ERROR)  # importing it on a CPU remarks on an optional package
try:
    import bitsandbytes as bnb
    from bitsandbytes.autograd._functions import MatMul4Bit, MatMul8bitFp, MatMul8bitLt

    bitsandbytes_cpu.mend()
finally:
    _logger.setLevel(_level)

if TYPE_CHECKING:
    from lowres.core.learner import LoadRequest

_BLOCK, _BLOCK_OF_SCALES = 64, 256
"""Weights to a scale, and scales to a scale of theirs: `bitsandbytes.functional.quantize_4bit`."""
_CODES_4BIT, _CODES_8BIT = 16, 256
"""Entries of the code books, in float32."""


def quantization_config(
    bits: Literal[4, 8],
    *,
    compute_dtype: str,
    skip: Sequence[str],
    kind: str = "nf4",
    double: bool = True,
    threshold: float = 6.0,
) -> Any:
    """The `BitsAndBytesConfig` that `from_pretrained` takes.

    Args:
        compute_dtype: What 4-bit weights are unpacked to, outside autocast: the model's dtype.
        skip: Module paths of linear layers that stay as they are.
        kind: Of 4 bits: `nf4` or `fp4`.
        double: Whether the scales of 4-bit blocks are themselves held in 8 bits.
        threshold: Of 8 bits: input features above it are multiplied in 16 bits; 0 for none.
    """
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=threshold, llm_int8_skip_modules=list(skip)
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
        llm_int8_skip_modules=list(skip),
    )


def load_in(bits: Literal[4, 8], request: LoadRequest, **fields: Any) -> LoadRequest:
    """The request with the linear layers of the blocks in so many bits, loaded where they will be.

    Args:
        fields: Further arguments of `quantization_config`.
    """
    config = quantization_config(
        bits, compute_dtype=request.dtype, skip=outside_blocks(request), **fields
    )
    options = {"device_map": {"": _home()}} | request.options | {"quantization_config": config}
    return dataclasses.replace(request, options=options)


def outside_blocks(request: LoadRequest) -> list[str]:
    """Module paths of the linear layers that lie in no block: poolers, output, classification.

    All of them, because a layer that the checkpoint does not hold would be replaced but never
    quantised, and fail at its first use (transformers 5.23).
    """
    from transformers.pytorch_utils import Conv1D

    from lowres.bridges import transformers as ours
    from lowres.bridges.blocks import map_blocks
    from lowres.bridges.kinds import auto_class

    config = ours.load_config(request.checkpoint, request.revision, request.trust_remote_code)
    if request.head == "classification":
        config.num_labels = request.labels
    with torch.device("meta"), quiet.transformers():
        skeleton = auto_class(request.head, config).from_config(
            config, trust_remote_code=request.trust_remote_code
        )
    blocks = tuple(f"{name}." for name in map_blocks(skeleton).names)
    return [
        path
        for path, module in skeleton.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not path.startswith(blocks)
    ]


def _home() -> int | str:
    """The device that the run trains on: quantised weights are best not moved.

    Moving 8-bit weights leaves their scales behind, and the full weights never are on the device
    all at once when each is quantised there as it arrives.
    """
    from accelerate.state import PartialState, is_initialized

    if is_initialized():
        kind = PartialState().device.type
    else:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.cuda.current_device() if kind == "cuda" else kind


class FrozenLinear4bit(bnb.nn.Linear4bit):
    """4-bit weights that are multiplied in the type in which `nn.Linear` would multiply.

    bitsandbytes 0.50 leaves that type to autocast inside its operator, where it depends on whether
    the operator is watched; rounds the bias to `compute_dtype` for good; and on CPUs with
    AVX512-BF16 repacks the weights at an evaluation into a form that has no gradient. It also keeps
    the packed weights for the backward pass past autograd, where they cannot be let go meanwhile.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, bias = as_linear_takes(x, self.bias)
        state = self.weight.quant_state
        wants_grad = torch.is_grad_enabled() and (
            x.requires_grad or (bias is not None and bias.requires_grad)
        )
        if wants_grad and x.numel() and state.shape[1] == x.shape[-1]:
            return _Packed.apply(x, self.weight, None, bias, state)
        return bnb.matmul_4bit(x, self.weight, state, bias=bias)


class FrozenLinear8bit(bnb.nn.Linear8bitLt):
    """8-bit weights for which nothing is kept but the weights themselves.

    bitsandbytes 0.50 keeps each input for a gradient of the weights that is never asked for, and
    not by `save_for_backward`: recomputing blocks would free none of them.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state.is_training = self.training
        # PEFT 0.21, reading the matrix of a layer on a CPU, puts a parameter without scales there.
        if self.weight.CB is not None and self.weight.SCB is not None:
            self.init_8bit_state()
        x, bias = as_linear_takes(x, self.bias)
        exact = self.training or torch.is_grad_enabled()
        unpacks = exact and not has_integer_products(x.device)
        multiply = _Unpacked if unpacks else _Integer
        # Some shapes and CPUs have integers multiplied as float32, which autocast would round.
        with torch.autocast(x.device.type, enabled=False):
            return multiply.apply(x, self.weight, None, bias, self.state)


def has_integer_products(device: torch.device) -> bool:
    """Whether bitsandbytes trains with 8-bit products there: CPUs have no fast ones."""
    return device.type not in ("cpu", "xpu")


class _Packed(MatMul4Bit):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        out = MatMul4Bit.forward(ctx, *arguments)
        ctx.tensors = (None, None)
        ctx.save_for_backward(arguments[1])
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (packed,) = ctx.saved_tensors
        ctx.tensors = (None, packed.view(-1, 1))
        found = MatMul4Bit.backward(ctx, grad)
        ctx.tensors = (None, None)
        return found


class _Integer(MatMul8bitLt):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        out = MatMul8bitLt.forward(ctx, *arguments)
        if not ctx.is_empty:
            ctx.tensors, ctx.tensor_states = (None, None, None), (None, None)
        return out


class _Unpacked(MatMul8bitFp):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        out = MatMul8bitFp.forward(ctx, *arguments)
        ctx.A = None
        return out


def settle(model: nn.Module) -> None:
    """Make freshly loaded quantised layers fit to be trained around."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.__class__ = FrozenLinear4bit
        elif isinstance(module, bnb.nn.Linear8bitLt):
            module.__class__ = FrozenLinear8bit
            # One line at each use of each layer whose input is not float16.
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def is_quantised(parameter: nn.Parameter) -> bool:
    """Whether a parameter holds packed 4-bit or 8-bit values, which cannot be trained."""
    return isinstance(parameter, bnb.nn.Params4bit | bnb.nn.Int8Params)


def is_eight_bit(parameter: nn.Parameter) -> bool:
    """Whether a parameter holds 8-bit values; that of a stand-in carries scales of its own."""
    return isinstance(parameter, bnb.nn.Int8Params) or hasattr(parameter, "SCB")


def element_count(parameter: nn.Parameter) -> int:
    """Weights that a parameter stands for; two lie in each byte of a 4-bit one, and of one that
    DeepSpeed divides among processes nothing is left in its own place.
    """
    state = getattr(parameter, "quant_state", None)
    whole = getattr(parameter, "ds_numel", parameter.numel())
    return int(whole) if state is None else int(state.shape.numel())


def quantisation_state(place: nn.Module | nn.Parameter) -> list[torch.Tensor]:
    """What is held beside the packed weights of one layer, and is neither parameter nor buffer.

    4 bits: scales, their code book, and of doubly quantised scales the mean, the scales' scales and
    their code book. 8 bits: one scale an output feature; give the layer, which takes them over from
    the parameter at its first use. Nothing for anything else.
    """
    if isinstance(place, bnb.nn.Linear8bitLt):
        held = [place.weight.SCB, place.state.SCB]
    elif isinstance(place, bnb.nn.Int8Params):
        held = [place.SCB]
    else:
        weight = place.weight if isinstance(place, bnb.nn.Linear4bit) else place
        state = getattr(weight, "quant_state", None)
        if state is None:
            return []
        held = [state.absmax, state.code]
        if state.nested:
            held += [state.offset, state.state2.absmax, state.state2.code]
    return [tensor for tensor in held if tensor is not None]


def asked_bytes(layer: Any, config: Any) -> int:
    """What a linear layer takes when it is packed as a `BitsAndBytesConfig` asks, scales and code
    books included.
    """
    weight = layer.weight
    count = element_count(weight)
    if config.load_in_8bit:
        return count + 4 * int(weight.shape[0])
    blocks = -(-count // _BLOCK)
    packed = -(-count // 2) + 4 * _CODES_4BIT
    if not config.bnb_4bit_use_double_quant:
        return packed + 4 * blocks
    return packed + blocks + 4 * -(-blocks // _BLOCK_OF_SCALES) + 4 * _CODES_8BIT + 4


def quantisation_states(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Path of the layer and tensor, for all that quantised layers hold beside their weights."""
    for path, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            yield from ((path, tensor) for tensor in quantisation_state(module))
