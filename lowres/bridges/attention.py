"""Trained keys and values in front of those that an attention computes itself.

transformers 5.23 looks its attention functions up by name at each call; the one named `sdpa` is
wrapped when the first prefix is made. What a delta adds is there in the call alone: it never enters
the cache, so that generating needs nothing else.

Shapes: B rows, T queries, S keys, P keys of prefixes, H heads, K heads of keys and values, E their
width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import AttentionInterface

from lowres.bridges.peft_tuner import DeltaLayer
from lowres.core.delta import features
from lowres.core.errors import InputError, LowresError, Problem

if TYPE_CHECKING:
    from lowres.bridges.sites import Attention

SERVED = "sdpa"
_MARK = "_lowres_prefixes"


def watch() -> None:
    """Let attentions ask their deltas for keys and values; nothing else changes by it."""
    original = AttentionInterface._global_mapping[SERVED]
    if not hasattr(original, _MARK):
        AttentionInterface.register(SERVED, _asking(original))


def stop_unless_served(model: Any) -> None:
    """Raise InputError where the model's attention would not ask, now or when it is next run."""
    unserved = _unserved(model.config)
    if unserved is not None and not getattr(model, "_supports_sdpa", True):
        text = (
            f"a {type(model).__name__} has no attention but its own, which takes no prefixes; use "
            "a method without them, such as lora"
        )
        raise InputError("the recipe", [Problem("method", text)])
    if unserved is not None:
        raise InputError("the recipe", [Problem("model.attention", unserved)])
    for module in model.modules():
        watched = _still_served in module._forward_pre_hooks.values()
        if _asks(module) and hasattr(module, "config") and not watched:
            module.register_forward_pre_hook(_still_served)


def _asks(module: nn.Module) -> bool:
    """Whether an attention looks its function up, and does not compute by itself."""
    return "ALL_ATTENTION_FUNCTIONS" in type(module).forward.__code__.co_names


def _unserved(config: Any) -> str | None:
    implementation = getattr(config, "_attn_implementation", None)
    if implementation == SERVED:
        return None
    return (
        f"'{implementation}' takes no prefixes, which the function that is wrapped would put "
        f"before its keys; set model.attention: {SERVED}"
    )


def _still_served(attention: Any, _inputs: Any) -> None:
    """The implementation may be switched while prefixes are there: they would be passed over."""
    unserved = _unserved(attention.config)
    if unserved is not None and _deltas(attention):
        raise LowresError(f"{unserved} (model.set_attn_implementation('{SERVED}'))")


def heads_of(model: Any, one: Attention) -> tuple[int, int]:
    """Heads of keys and values K, and their width E.

    Raises:
        InputError: When the attention is not known to take a prefix.
    """
    inner = model.get_submodule(one.inner)
    names = ("head_dim", "attention_head_size", "key_value_proj_dim")
    width = next((int(getattr(inner, n)) for n in names if hasattr(inner, n)), None)
    # One that computes by itself would pass prefixes by in silence.
    if width is None or not _asks(inner):
        text = (
            f"{type(inner).__name__} computes its attention by itself, so that no keys and values "
            "can be put before its own; use lora or an adapter"
        )
        raise InputError("the recipe", [Problem("method", text)])
    config = model.config.get_text_config(decoder=True)
    if one.fused:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return int(heads), width
    return features(model.get_submodule(one.key))[1] // width, width


def _asking(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **others: Any,
    ) -> Any:
        deltas = _deltas(module)
        if not deltas:
            return original(module, query, key, value, attention_mask, *args, **others)
        given = (query, key, value, attention_mask)
        return _with_prefixes(deltas, original, module, *given, *args, **others)

    setattr(attend, _MARK, True)
    return attend


def _deltas(module: nn.Module) -> list[Any]:
    """Working deltas of the module's own layers that offer keys and values."""
    return [
        delta
        for child in module._modules.values()
        if isinstance(child, DeltaLayer)
        for delta in child.working()
        if hasattr(delta, "keys_values")
    ]


def _with_prefixes(
    deltas: list[Any],
    original: Callable[..., Any],
    module: nn.Module,
    query_BHTE: torch.Tensor,
    key_BKSE: torch.Tensor,
    value_BKSE: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> Any:
    if others.get("cache") is not None:
        raise LowresError(
            "a prefix does not go into the paged cache of continuous batching; use generate()"
        )
    width, queries = query_BHTE.shape[-1], query_BHTE.shape[2]
    causal = others.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if causal and mask is None and queries > 1:
        # What sdpa says by a flag is written out. A cache may have room behind the last key.
        key_BKSE, value_BKSE = key_BKSE[:, :, :queries], value_BKSE[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
        mask = torch.ones(queries, queries, dtype=torch.bool, device=query_BHTE.device).tril()
        mask = mask[None, None]
    keys, values, gates = [], [], []
    for delta in deltas:
        more = delta.keys_values(query_BHTE.shape[0])
        keys.append(more[0].to(key_BKSE.dtype))
        values.append(more[1].to(value_BKSE.dtype))
        gates.append(delta.take_gate() if hasattr(delta, "take_gate") else None)
    front = sum(k.shape[2] for k in keys)
    if mask is not None:
        mask = torch.cat([_columns(mask, front, 1 if mask.dtype == torch.bool else 0), mask], -1)
    if position_bias is not None:
        position_bias = torch.cat([_columns(position_bias, front, 0), position_bias], -1)
        others["position_bias"] = position_bias
    keys.append(key_BKSE)
    values.append(value_BKSE)
    gates.append(None)
    gated_BT1 = [gate.to(query_BHTE.dtype) for gate in gates if gate is not None]
    if gated_BT1:
        # Softmax must go over all keys at once, while each query has its own gate g: queries
        # (q, g q) meet keys (k, 0) of the model and (0, k) of the prefix, values lie likewise.
        scaling = width**-0.5 if scaling is None else scaling
        slots = _slots(gates)
        keys, values = (
            [
                F.pad(t, (at * width, (len(gated_BT1) - at) * width))
                for t, at in zip(ts, slots, strict=True)
            ]
            for ts in (keys, values)
        )
        more_queries = [query_BHTE * gate[:, None] for gate in gated_BT1]
        query_BHTE = torch.cat([query_BHTE, *more_queries], -1)
    out_BTHE, weights = original(
        module, query_BHTE, torch.cat(keys, 2), torch.cat(values, 2), mask, scaling=scaling,
        is_causal=False, **others,
    )  # fmt: skip
    if gated_BT1:
        out_BTHE, *parts = out_BTHE.split(width, -1)
        for gate, part in zip(gated_BT1, parts, strict=True):
            out_BTHE = out_BTHE + gate[..., None] * part
    return out_BTHE, weights


def _columns(like: torch.Tensor, count: int, value: int) -> torch.Tensor:
    """So many columns that let a query see (1 of a boolean mask, 0 of what is added)."""
    return like.new_full((*like.shape[:-1], count), value)


def _slots(gates: list[Any]) -> list[int]:
    """Which part of the widened heads each prefix uses; 0 without a gate."""
    at, out = 0, []
    for gate in gates:
        at += gate is not None
        out.append(at if gate is not None else 0)
    return out
