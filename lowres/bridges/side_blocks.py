"""Small blocks beside those of a model: its own class at a fraction of the width.

Legend: d width of the model, w of the small block; rows and columns are those of a matrix (o, i).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import cache_utils
from transformers.utils.output_capturing import _active_collector as _collector

from lowres.bridges import pruned
from lowres.bridges.blocks import number_of, renumber
from lowres.core.delta import place
from lowres.core.errors import InputError, LowresError

LEAST = 8
"""Features of a small block, whatever the reduction."""
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
          "decoder_attention_heads")  # fmt: skip
_GROUPS = ("num_key_value_heads", "num_kv_heads")
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "hidden_dim", "encoder_ffn_dim",
          "decoder_ffn_dim", "ffn_hidden_size")  # fmt: skip
_SHARED_BIAS = "has_relative_attention_bias"
"""T5's blocks share a table of biases by distance that lives in the first of a stack."""


def widths(block: nn.Module, reduction: int) -> tuple[int, int]:
    """Features (d, w) of a block's hidden states and of the small block's."""
    wide = int(_config_of(block).hidden_size)
    return wide, _narrowed(wide, reduction)


def _narrowed(wide: int, reduction: int) -> int:
    # Of two or three features a norm leaves nothing but their signs.
    return max(min(LEAST, wide), wide // reduction)


def make(block: nn.Module, reduction: int, opens: bool) -> Any:
    """A block of the same class, `reduction` times narrower, with what matters most of the weights.

    Args:
        opens: Whether it is the first of its stack, which owns what the stack shares.

    Raises:
        InputError: Where the class cannot be made narrower.
    """
    config = _shrunk(_config_of(block), reduction)
    number = number_of(block) or 0
    given: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(type(block)).parameters.items())[1:]:
        if name in ("layer_idx", "layer_id", "layer_number"):
            given[name] = number
        elif name == _SHARED_BIAS:
            given[name] = opens
        elif parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY,
        ):  # fmt: skip
            raise _refused(block, f"it is made with '{name}'")
    refused = {"alibi"} & set(arguments_of(block))
    if "position_bias" in arguments_of(block) and _SHARED_BIAS not in given:
        refused.add("position_bias")
    if "rel_embeddings" in arguments_of(block) and getattr(config, "relative_attention", False):
        raise _refused(block, "it is given embeddings of relative positions, as wide as the model")
    if refused:
        raise _refused(block, f"its heads are given {refused.pop()}, as many as the model has")
    try:
        with torch.device(place(block)):
            small = type(block)(config, **given)
    except (ValueError, TypeError, RuntimeError) as error:
        raise _refused(block, str(error)) from error
    pruned.copy_into(small, block, config.hidden_size)
    return small.train(block.training)


def _refused(block: nn.Module, why: str) -> InputError:
    text = f"a {type(block).__name__} cannot be made narrower: {why}; use lora"
    return InputError("the recipe", [f"method 'ladder': {text}"])


def arguments_of(block: Any) -> dict[str, Any]:
    """Names of what a block is called with, in their order, and what they are when not given."""
    return {
        name: one.default
        for name, one in inspect.signature(block.forward).parameters.items()
        if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    }


def _config_of(block: nn.Module) -> Any:
    for module in block.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "hidden_size") and hasattr(config, "num_attention_heads"):
            return config
    raise _refused(block, "it keeps no configuration")


def _shrunk(config: Any, reduction: int) -> Any:
    """The configuration with widths, heads and feed-forward units divided; heads keep their size
    where that is free of the width."""
    small = copy.deepcopy(config)
    held = {key: value for key, value in vars(config).items() if isinstance(value, int)}
    width = _narrowed(config.hidden_size, reduction)
    free = any(getattr(config, key, None) for key in ("head_dim", "d_kv"))
    for key in held.keys() & {*_WIDTHS, *_INNER}:
        setattr(small, key, _narrowed(held[key], reduction))
    for key in held.keys() & set(_HEADS):
        heads = max(1, held[key] // reduction)
        while not free and width % heads:
            heads -= 1
        setattr(small, key, heads)
    for key in held.keys() & set(_GROUPS):
        same = held[key] == config.num_attention_heads
        groups = small.num_attention_heads
        if not same:
            groups = math.gcd(groups, max(1, held[key] // reduction))
        setattr(small, key, groups)
    return small


@contextlib.contextmanager
def working(kind: str, dtype: torch.dtype) -> Iterator[None]:
    """While a small block computes in a type, on a kind of device.

    Its outputs are not taken for those of the model's blocks, whose class it has.
    """
    narrow = dtype == torch.bfloat16
    token = _collector.set(None)
    try:
        with torch.autocast(kind, dtype) if narrow else contextlib.nullcontext():
            yield
    finally:
        _collector.reset(token)


_SPACES: Mapping[type, tuple[str, ...]] = {
    cache_utils.DynamicLayer: (),
    cache_utils.DynamicSlidingWindowLayer: ("sliding_window",),
    cache_utils.StaticLayer: ("max_cache_len",),
}
"""Kinds of a cache's layers and what each is made with."""


@dataclass(frozen=True)
class Room:
    """Where a small block keeps keys and values while text is generated.

    They lie in the model's cache behind those of its blocks, so that whatever is done with the
    cache (reordering beams, cropping, copying) is done with them, too.

    Args:
        beside: Number of the block beside it; None where it keeps none.
        depth: How many blocks the stack has.
    """

    beside: int | None
    depth: int

    @classmethod
    def beside_block(cls, block: nn.Module) -> Room:
        return cls(number_of(block), int(_config_of(block).num_hidden_layers))

    def take(self, small: nn.Module, given: Mapping[str, Any]) -> None:
        """Make sure of the place in the cache among a block's arguments, if there is one.

        Raises:
            LowresError: For a kind of cache that is not known, or a block without a number.
        """
        cache: Any = next((v for v in given.values() if isinstance(v, cache_utils.Cache)), None)
        if cache is None:
            return
        if self.beside is None:
            raise LowresError(
                f"method 'ladder': a cache is given, in which a {type(small).__name__} has no "
                "number of its own to put its side network beside; generate with use_cache=False"
            )
        both = isinstance(cache, cache_utils.EncoderDecoderCache)
        caches = (cache.self_attention_cache, cache.cross_attention_cache) if both else (cache,)
        taken: dict[int, int] = vars(caches[0]).setdefault("_lowres_taken", {})
        if id(small) not in taken:
            for one in caches:
                kind = one.layer_class_to_replicate  # where layers are made as they are reached
                while kind is not None and len(one.layers) < self.depth:
                    one.layers.append(kind())
            at = taken[id(small)] = max(len(one.layers) for one in caches)
            for one in caches:
                one.layers += [_like(one, self.beside) for _ in range(at + 1 - len(one.layers))]
        renumber(small, taken[id(small)])


def _like(cache: Any, at: int) -> Any:
    layer = cache.layers[at]
    fields = _SPACES.get(type(layer))
    if fields is None or cache.offloading:
        kind = "an offloaded cache" if fields is not None else f"a {type(layer).__name__}"
        raise LowresError(
            f"method 'ladder': its side network keeps keys and values of its own, for which {kind} "
            "has no place; generate with cache_implementation='dynamic'"
        )
    return type(layer)(**{name: getattr(layer, name) for name in fields})
