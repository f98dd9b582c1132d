"""What a CUDA device does differently from the CPU on which a trace runs.

Fake tensors of the CPU go through the CPU's choice of kernels. Where CUDA chooses another, the rule
stands here, with what its kernel saves and what it takes while it works. Rules are for torch 2.11
to 2.13.

Source: ATen/native/transformers/cuda/{sdp_utils.cpp,attention.cu,attention_backward.cu},
ATen/autocast_mode.h, ATen/cuda/CUDABlas.cpp of PyTorch; csrc/flash_attn of flash-attention 2.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch.nn import functional as F

from lowres.bridges import bitsandbytes
from lowres.memory.trace import LIBRARY
from lowres.memory.tracer import Tracer

aten = torch.ops.aten

_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
_plain_attention, _plain_dropout = F.scaled_dot_product_attention, F.dropout
_SIXTEEN_BITS = (torch.float16, torch.bfloat16)

_AUTOCAST_TO_FLOAT32: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (F, ("softmax", "log_softmax", "layer_norm", "rms_norm", "group_norm", "softplus", "mse_loss",
         "smooth_l1_loss", "l1_loss", "kl_div")),
    (torch, ("softmax", "log_softmax", "pow", "rsqrt", "exp", "log", "sum", "cumsum", "prod",
             "norm", "cosh", "sinh", "tan", "acos", "asin", "expm1", "log1p", "reciprocal")),
    (torch.Tensor, ("softmax", "log_softmax", "pow", "__pow__", "rsqrt", "exp", "log", "sum",
                    "cumsum", "prod", "norm", "expm1", "log1p", "reciprocal")),
)  # fmt: skip
"""Functions whose half-precision input autocast widens on CUDA but not on a CPU."""


@dataclass(frozen=True)
class Target:
    """The device whose behaviour is wanted.

    Args:
        kind: `cpu` changes nothing.
        workspace_bytes: Of a cuBLAS handle; a training process has two.
        flash: Whether the device is new enough (Ampere) for flash attention, and for fused kernels
            in bfloat16.
        as_float16: What is traced in bfloat16 is float16 on the device.
    """

    kind: Literal["cpu", "cuda"] = "cpu"
    workspace_bytes: int = 8_519_680
    flash: bool = True
    as_float16: bool = False

    def on_host(self, tracer: Tracer) -> contextlib.AbstractContextManager[None]:
        """For what is made in host memory and does not count on the device."""
        return tracer.paused() if self.kind == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def translating(tracer: Tracer, target: Target) -> Iterator[None]:
    """Trace as on the target while the block runs."""
    if target.kind == "cpu":
        yield
        return
    from torch.utils import _foreach_utils

    devices = lambda: ["cuda", "cpu"]
    tracer.after_operation = _Workspaces(tracer, target.workspace_bytes)
    with contextlib.ExitStack() as stack:
        # Functions are exchanged where callers look them up: a function mode would be off while
        # autograd recomputes checkpointed blocks.

        def patch(owner: Any, name: str, function: Callable[..., Any]) -> None:
            stack.enter_context(mock.patch.object(owner, name, function))

        patch(F, "scaled_dot_product_attention", functools.partial(_attention, tracer, target))
        patch(F, "dropout", _dropout)
        for owner, names in _AUTOCAST_TO_FLOAT32:
            for name in names:
                patch(owner, name, _widened(getattr(owner, name)))
        patch(bitsandbytes, "has_integer_products", lambda _: True)
        # Clipping and optimizers use the list kernels on CUDA unless told otherwise.
        patch(_foreach_utils, "_get_foreach_kernels_supported_devices", devices)
        yield
    tracer.after_operation = None


def _widened(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wide(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu") and args and isinstance(args[0], torch.Tensor):
            if args[0].dtype in _SIXTEEN_BITS and kwargs.get("dtype") is None:
                args = (args[0].float(), *args[1:])
        return function(*args, **kwargs)

    return wide


class _Workspaces:
    """Memory that kernels take beside their results."""

    def __init__(self, tracer: Tracer, product_bytes: int) -> None:
        self.tracer, self.product_bytes = tracer, product_bytes
        self._handles: set[str] = set()

    def __call__(self, func: Any, args: Any, out: Any) -> None:
        if func in _PRODUCTS:
            # One handle a thread: autograd has its own.
            thread = "backward" if self.tracer.stage == "backward" else "forward"
            if thread not in self._handles:
                self._handles.add(thread)
                self.tracer.permanent(self.product_bytes, f"{LIBRARY} ({thread})")
        elif func.namespace == "bitsandbytes" and func._opname == "gemm_4bit":
            # Beyond some rows, by a table of its own for each architecture, the kernel unpacks the
            # whole matrix first; that is assumed of all, so it is not planned too low.
            features_out, features_in = args[2]
            weights = features_out * features_in
            unpacked = weights * args[0].element_size() + 2 * 4 * (weights // args[4])
            self.tracer.workspace(unpacked, "unpacked matrix of gemm_4bit")
        elif func is aten.embedding_dense_backward.default:
            # Indices are sorted with their positions: keys and values, in and out (CUB).
            self.tracer.workspace(4 * 8 * args[1].numel(), "sort of embedding_dense_backward")


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not training or p == 0:
        return _plain_dropout(x, p, training, inplace)
    # CUDA's kernel keeps a mask of one byte an element.
    return torch.native_dropout(x, p, True)[0]


def _attention(
    tracer: Tracer,
    target: Target,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The kernel that CUDA would choose: flash for 16 bits without a mask, else memory-efficient,
    else plain products in float32.

    Shapes: query (B, H, T, D), key and value (B, K, S, D), mask broadcast to (B, H, T, S).
    """
    if query.dim() != 4:
        return _plain_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if torch.is_autocast_enabled("cpu"):
        wanted = torch.get_autocast_dtype("cpu")
        query, key, value = (t.to(wanted) for t in (query, key, value))
    flash = (
        target.flash
        and attn_mask is None
        and query.dtype in _SIXTEEN_BITS
        and query.shape[-1] <= 256
    )
    grouped = enable_gqa and key.shape[1] != query.shape[1]
    # The memory-efficient kernel takes no groups, and before Ampere no bfloat16.
    too_old = not target.flash and query.dtype is torch.bfloat16 and not target.as_float16
    if not flash and (grouped or too_old):
        with torch.autocast("cpu", enabled=False):
            return _written_out(query, key, value, attn_mask, scale)
    bias = None
    if attn_mask is not None:
        bias = attn_mask
        if bias.dtype is torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(bias, 0.0)
        if bias.shape[-1] % 8:
            # Rows are padded to a multiple of eight elements.
            bias = F.pad(bias, (0, 8 - bias.shape[-1] % 8))[..., : bias.shape[-1]]
    # A kernel's width is a multiple of eight; narrower heads are copied.
    width = query.shape[-1]
    if width % 8:
        query, key, value = (F.pad(t, (0, 8 - width % 8)) for t in (query, key, value))
    out: torch.Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        tracer, flash, query, key, value, bias
    )
    return out[..., :width] if width % 8 else out


def _written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """The plain kernel: all that is between is float32, also of 16 bits and under autocast."""
    wide = [t.float() for t in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        wide[1:] = [t.repeat_interleave(groups, 1) for t in wide[1:]]
    root = (scale or query.shape[-1] ** -0.5) ** 0.5
    scores = (wide[0] * root) @ (wide[1] * root).transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    shares = torch.softmax(scores, -1)
    del scores
    return (shares @ wide[2]).to(query.dtype)


class _Attention(torch.autograd.Function):
    """Shapes of the fused kernels: what is saved, made and borrowed."""

    @staticmethod
    def forward(
        ctx: Any,
        tracer: Tracer,
        flash: bool,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        batch, heads, length, width = query.shape
        # The kernel writes (B, T, H, D); callers see it transposed.
        out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        rows = length if flash else -(-length // 32) * 32
        logsumexp = query.new_empty(batch, heads, rows, dtype=torch.float32)
        seed = query.new_empty(2, dtype=torch.float64)
        ctx.save_for_backward(query, key, value, bias, out, logsumexp, seed)
        ctx.flash, ctx.tracer = flash, tracer
        flops = 4 * batch * heads * length * key.shape[2] * width
        moved = sum(t.numel() * t.element_size() for t in (query, key, value, out))
        tracer.cost("attention", query.dtype, flops, moved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, bias, out, _, _ = ctx.saved_tensors
        batch, heads, length, width = query.shape
        rounded_width = width if width <= 32 else -(-width // 32) * 32
        tracer: Tracer = ctx.tracer
        rows = -(-length // 128) * 128
        borrowed = [query.new_empty(batch, heads, rows, dtype=torch.float32)]
        if ctx.flash:
            borrowed.append(query.new_empty(batch, rows, heads, rounded_width, dtype=torch.float32))
        elif query.dtype in _SIXTEEN_BITS:
            borrowed.append(query.new_empty(batch, heads, length, width, dtype=torch.float32))
        d_query = torch.empty_like(query)
        d_key, d_value = torch.empty_like(key), torch.empty_like(value)
        if key.shape[1] != heads:
            # The kernel writes a gradient for every query head; groups are summed afterwards.
            for t in (key, value):
                borrowed.append(t.new_empty(batch, t.shape[2], heads, t.shape[3]))
        flops = 10 * batch * heads * length * key.shape[2] * width
        moved = 2 * sum(t.numel() * t.element_size() for t in (query, key, value, out))
        tracer.cost("attention", query.dtype, flops, moved)
        del borrowed
        return None, None, d_query, d_key, d_value, None
