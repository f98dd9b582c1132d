"""Where attention and feed-forward parts of a transformers model have their linear layers.

Told by the names that transformers uses and by the place in a block; a model that names them
otherwise is refused, with what is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowres.core.errors import InputError, Problem

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks

_QUERY = {"q_proj", "query", "q", "q_lin", "query_proj"}
_KEY = {"k_proj", "key", "k", "k_lin", "key_proj"}
_VALUE = {"v_proj", "value", "v", "v_lin", "value_proj"}
_FUSED = {"c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "in_proj"}
"""Of these an `in_proj` counts inside of an attention alone: Mamba's makes no queries."""
_OUT = {"o_proj", "out_proj", "o", "out_lin", "dense", "c_proj", "Wo"}
_UP = {"fc1", "gate_proj", "up_proj", "wi", "wi_0", "wi_1", "c_fc", "dense_h_to_4h", "lin1",
       "gate_up_proj", "Wi", "dense"}  # fmt: skip
_DOWN = {"fc2", "down_proj", "wo", "c_proj", "dense_4h_to_h", "lin2", "Wo", "dense"}
_IN_KERNEL = {"conv1d", "x_proj", "dt_proj", "out_proj"}
_ATTENTION = ("attn", "attention")
_CROSS = ("encoder_attn", "EncDecAttention", "crossattention", "cross_attn")


@dataclass(frozen=True)
class Attention:
    """One attention of a block, by module paths. A fused projection stands for all three.

    Args:
        inner: The module that calls the attention kernel.
        cross: Whether it looks at the encoder's output.
    """

    block: str
    inner: str
    query: str
    key: str
    value: str
    out: str
    cross: bool

    @property
    def fused(self) -> bool:
        return self.query == self.key


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward part of a block: the layers that widen (two where one is a gate), and the
    one back."""

    block: str
    up: tuple[str, ...]
    down: str


@dataclass(frozen=True)
class TokenEmbedding:
    """What the token ids of a stack of blocks go through.

    Args:
        blocks: Paths of the trained blocks above it.
        hidden: Width of what enters the blocks; embeddings may be narrower.
    """

    path: str
    blocks: tuple[str, ...]
    vocabulary: int
    width: int
    hidden: int


def attentions(model: nn.Module, blocks: Blocks, *, trained_only: bool = True) -> list[Attention]:
    """The attentions of the blocks, in the order of the model.

    Raises:
        InputError: When a block has none that is known.
    """
    return [
        one
        for name in _blocks(blocks, trained_only)
        for one in _attentions_of(name, _linears(model.get_submodule(name)))
    ]


def feed_forwards(
    model: nn.Module, blocks: Blocks, *, trained_only: bool = True
) -> list[FeedForward]:
    """The feed-forward parts of the blocks, in the order of the model.

    Raises:
        InputError: When a block has none that is known, or experts in its place.
    """
    return [
        _feed_forward_of(name, _linears(model.get_submodule(name)), _has_experts(model, name))
        for name in _blocks(blocks, trained_only)
    ]


def token_embeddings(model: nn.Module, blocks: Blocks) -> list[TokenEmbedding]:
    """The embedding below each stack that has trained blocks.

    Raises:
        InputError: Where a stack has none of its own.
    """
    stacks: dict[str, list[str]] = {}
    for name in _blocks(blocks, True):
        stacks.setdefault(name.rpartition(".")[0], []).append(name)
    out: list[TokenEmbedding] = []
    for stack, names in stacks.items():
        path, embedding = _embedding_below(model, stack)
        config: Any = model.config
        hidden = int(config.get_text_config().hidden_size)
        vocabulary, width = int(embedding.num_embeddings), int(embedding.embedding_dim)
        out.append(TokenEmbedding(path, tuple(names), vocabulary, width, hidden))
    if len({one.path for one in out}) < len(out):
        raise _refused(f"the stacks {', '.join(stacks)} share one embedding module; use lora")
    return out


def _embedding_below(model: nn.Module, stack: str) -> tuple[str, Any]:
    """Path and module of the token embedding that belongs to the innermost part around a stack."""
    around = stack
    while around:
        around = around.rpartition(".")[0]
        part: Any = model.get_submodule(around)
        embedding = part.get_input_embeddings() if hasattr(part, "get_input_embeddings") else None
        embedding = getattr(embedding, "base_layer", embedding)
        if hasattr(embedding, "num_embeddings"):
            paths = [n for n, m in model.named_modules() if m is embedding]
            return paths[0].removesuffix(".base_layer"), embedding
    raise _refused(f"no embedding of token ids is known below {stack}; use lora")


def read_by_kernels(model: nn.Module) -> set[str]:
    """Paths of the modules of Mamba's mixers whose weights their kernels read: they are not called,
    some on a card alone, so what stands beside them has no effect."""
    mixers = [p for p, m in model.named_modules() if {"A_log", "D"} <= m._parameters.keys()]
    return {f"{path}.{name}" for path in mixers for name in _IN_KERNEL}


def norms(model: nn.Module, blocks: Blocks) -> list[str]:
    """Paths of the normalisation layers where the freezing allows training."""
    return [
        path
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and any(True for _ in module.parameters(recurse=False))
        and blocks.trains(f"{path}.weight")
        and not blocks.in_head(path)
    ]


def _blocks(blocks: Blocks, trained_only: bool) -> list[str]:
    names = [n for n in blocks.names if n in blocks.trained or not trained_only]
    if not names:
        raise _refused("the freezing leaves no block trained; train some, or use method 'full'")
    return names


def _linears(block: nn.Module) -> list[str]:
    """Paths within a block of everything that multiplies with a matrix, under adapters too."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found = [n for n, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    inside = ("lora_", "lowres_delta_parts")
    return [n.removesuffix(".base_layer") for n in found if not any(i in n for i in inside)]


def _attentions_of(block: str, linears: list[str]) -> list[Attention]:
    found = []
    for path in linears:
        inner, _, last = path.rpartition(".")
        siblings = {n.rpartition(".")[2]: n for n in linears if n.rpartition(".")[0] == inner}
        if last in _FUSED and (last != "in_proj" or any(word in inner for word in _ATTENTION)):
            query = key = value = path
        elif last in _QUERY:
            query = path
            key, value = (_one_of(siblings, names) for names in (_KEY, _VALUE))
        else:
            continue
        # BERT's output projection lies beside the attention (`attention.output.dense`).
        outer = inner.rpartition(".")[0]
        beside = [n for n in linears if n.startswith(f"{outer}.") and outer and "self" in inner]
        out = _one_of(siblings, _OUT - {last}) or next(iter(n for n in beside if n.endswith(
            (".output.dense", ".out_proj"))), "")  # fmt: skip
        if key and value and out:
            cross = any(word in path for word in _CROSS)
            full = [f"{block}.{n}" for n in (inner, query, key, value, out)]
            found.append(Attention(block, *full, cross))  # type: ignore[call-arg, arg-type]
    if not found:
        raise _refused(f"no attention is known in {block}; its linear layers are {linears}")
    return found


def _one_of(siblings: dict[str, str], names: set[str]) -> str:
    return next((path for last, path in siblings.items() if last in names), "")


def _has_experts(model: nn.Module, block: str) -> bool:
    """Of any make: linear layers for each, or one tensor of all."""
    return any("expert" in path for path, _ in model.get_submodule(block).named_modules())


def _feed_forward_of(block: str, linears: list[str], experts: bool) -> FeedForward:
    if experts:
        raise _refused(f"{block} is a mixture of experts; use lora on the attention's layers")
    rest = [n for n in linears if not any(word in n.lower() for word in _ATTENTION)]
    last: Callable[[str], str] = lambda n: n.rpartition(".")[2]
    up = [n for n in rest if last(n) in _UP]
    down = [n for n in rest if last(n) in _DOWN and n not in up]
    if not down and len(up) > 1:  # BERT calls both `dense`.
        *up, only = up
        down = [only]
    if not up or len(down) != 1:
        raise _refused(f"no feed-forward part is known in {block}; its linear layers are {linears}")
    return FeedForward(block, tuple(f"{block}.{n}" for n in up), f"{block}.{down[0]}")


def _refused(text: str) -> InputError:
    return InputError("the recipe", [Problem("method", text)])
