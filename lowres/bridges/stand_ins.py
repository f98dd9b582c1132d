"""bitsandbytes layers over fake weights: real quantisation calls, parameters that can be fake.

`Params4bit` and `Int8Params` make real tensors of what they are given; here plain parameters carry
the attributes that the layers and PEFT read.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn


@functools.cache
def prepare() -> None:
    """Make bitsandbytes' code books, which it computes once from values: before a trace begins."""
    from bitsandbytes import functional

    import lowres.bridges.bitsandbytes  # noqa: F401  (imports it without its remark)

    for kind in ("nf4", "fp4"):
        functional.quantize_4bit(torch.zeros(256, 64), compress_statistics=True, quant_type=kind)
    functional.quantize_blockwise(torch.zeros(256))
    if "udynamic" not in functional.name2qmap:
        functional.name2qmap["udynamic"] = functional.create_dynamic_map(signed=False)


@contextlib.contextmanager
def unpacked_as_real() -> Iterator[None]:
    """PEFT's HiRA knows a packed weight by the name of its class, which a stand-in has not."""
    from bitsandbytes import functional

    hira: Any = importlib.import_module("peft.tuners.hira.bnb")  # its package has another `bnb`
    usual = hira.dequantize_bnb_weight

    def dequantize(weight: Any, state: Any = None) -> torch.Tensor:
        if hasattr(weight, "bnb_quantized"):  # in 4 bits
            whole: torch.Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
            return whole
        return usual(weight, state)

    with mock.patch.object(hira, "dequantize_bnb_weight", dequantize):
        yield


def replace_linear(model: nn.Module, config: Any) -> None:
    """Put quantised layers where `from_pretrained` with this config would; still without memory."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    # T5 looks at the type of its second feed-forward matrix, so transformers leaves that one alone.
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    replace_with_bnb_linear(model, [*(config.llm_int8_skip_modules or ()), *kept], config)


def is_quantised(module: nn.Module, name: str) -> bool:
    """Whether a parameter of a module is to be packed."""
    import bitsandbytes as bnb

    return name == "weight" and isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)


def pack(module: Any, weight: torch.Tensor) -> nn.Parameter:
    """The packed parameter of a quantised layer, with its quantisation state."""
    import bitsandbytes as bnb
    from bitsandbytes import functional
    from transformers.pytorch_utils import Conv1D

    if issubclass(module.source_cls, Conv1D):
        weight = weight.T
    old = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        packed, state = functional.quantize_4bit(
            weight.contiguous(),
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
        )
        parameter: Any = nn.Parameter(packed, requires_grad=False)
        for key in ("blocksize", "compress_statistics", "quant_type", "quant_storage"):
            setattr(parameter, key, getattr(old, key))
        parameter.quant_state, parameter.bnb_quantized, parameter.module = state, True, module
        module.quant_state = state
        return parameter
    values, scales, _ = functional.int8_vectorwise_quant(weight.contiguous().to(torch.float16))
    parameter = nn.Parameter(values, requires_grad=False)
    parameter.CB, parameter.SCB, parameter.has_fp16_weights = parameter.data, scales, False
    return parameter
