"""The blocks of a transformers model: where its parameters live, and recomputing them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from lowres.core.blocks import Blocks
from lowres.core.errors import InputError, LowresError, Problem

_HEADS = ("classifier", "score")
"""How names of modules end that PEFT trains, saves and expects in the file of every adapter of a
text classifier, whether they were made anew or not (`PeftModelForSequenceClassification`)."""
# Parameters outside the blocks that act before the first one. Not by registration order: OPT
# registers its final norm before its blocks.
_STEM = re.compile(r"(^|\.)([a-z_]*emb[a-z_]*|project_in)(\.|$)")


def map_blocks(
    model: nn.Module, fresh: Iterable[str] = (), *, may_have_new_head: bool = False
) -> Blocks:
    """The map of a model's parameters: repeated blocks, embeddings below, what was made anew.

    Args:
        fresh: Parameters that a checkpoint lacked; of weights that are random on purpose, none.
        may_have_new_head: Whether parameters above the blocks may be among the fresh ones.

    Raises:
        InputError: When pretrained weights are missing where none may be made anew.
        LowresError: When no list of blocks is found.
    """
    config: Any = model.config
    depths = {
        getattr(config, key, None)
        for key in (
            "num_hidden_layers",
            "num_layers",
            "num_decoder_layers",
            "encoder_layers",
            "decoder_layers",
        )  # fmt: skip
    }
    stacks: dict[str, int] = {}
    for path, module in model.named_modules():
        nested = any(path.startswith(s + ".") for s in stacks)
        if isinstance(module, nn.ModuleList) and len(module) in depths and not nested:
            stacks[path] = len(module)
    names = tuple(f"{stack}.{i}" for stack, depth in stacks.items() for i in range(depth))
    if not names:
        raise LowresError(
            f"no repeated blocks were found in {type(model).__name__}; "
            f"its config says {depths} layers"
        )
    output = getattr(model, "get_output_embeddings", lambda: None)()
    stem, head, lost = set(), set(), []
    fresh_set = set(fresh)
    for path, module in model.named_modules():
        own = [n for n, _ in module.named_parameters(recurse=False)]
        inside = any(path == n or path.startswith(n + ".") for n in names)
        if not own or module is output:
            continue
        if any(f"{path}.{n}" in fresh_set for n in own):
            if inside or not may_have_new_head or _is_stem(path, module):
                lost.append(path)
            head.add(path)
        elif not inside and _is_stem(path, module):
            stem.add(path)
    if lost:
        raise InputError(
            "the recipe",
            [
                Problem(
                    "model.checkpoint",
                    f"it holds no weights for {', '.join(lost[:4])}"
                    f"{f' and {len(lost) - 4} more' if len(lost) > 4 else ''}, which would be "
                    "random; only a classification head may be made anew",
                )
            ],
        )
    if may_have_new_head and type(model).__name__.endswith("ForSequenceClassification"):
        whole = {p for p, _ in model.named_modules() if p.endswith(_HEADS) and p not in names}
        head = whole | {p for p in head if not any(p.startswith(w + ".") for w in whole)}
    return Blocks(
        names=names, trained=frozenset(names), stem=tuple(sorted(stem)), head=tuple(sorted(head))
    )


def _is_stem(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or bool(_STEM.search(path))


def number_of(block: nn.Module) -> int | None:
    """Its place in a cache of keys and values."""
    return next((vars(m)[name] for m in block.modules() for name in _numbers(m)), None)


def renumber(block: nn.Module, number: int) -> None:
    """Give it another place, wherever its modules hold theirs."""
    for module in block.modules():
        for name in _numbers(module):
            setattr(module, name, number)


def _numbers(module: nn.Module) -> list[str]:
    # GPT-Neo, XLM and Flaubert call it an id.
    return [n for n in ("layer_idx", "layer_id") if isinstance(vars(module).get(n), int)]


def checkpoint_blocks(model: nn.Module, every: int = 1) -> None:
    """Recompute blocks in the backward pass (non-reentrant: works with frozen inputs).

    Args:
        every: The first and each `every`-th after it.

    Raises:
        InputError: When the model cannot recompute some of its blocks alone.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    inner: Any = model
    how: dict[str, Any] = {"use_reentrant": False}
    # transformers 5.23 renamed the call; both names stay until setup.cfg asks for 6.
    enable = getattr(inner, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs=how)
    else:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    # Beside adapters transformers has the embeddings' output ask for a gradient, which only the
    # reentrant kind needs: backward would go through every frozen block, down to the input.
    inner.disable_input_require_grads()
    if every == 1:
        return
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        text = f"{type(model).__name__} recomputes all blocks or none; set every to 1"
        raise InputError("the recipe", [f"lever 'gradient_checkpointing': {text}"])
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number % every == 0


def set_dropout(config: Any, share: float | None) -> None:
    """Put one share in place of every share of dropout in a configuration; 0 keeps all blocks, too.

    Raises:
        InputError: When there is none to be raised.
    """
    if share is None:
        return
    found = False
    for one in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in list(vars(one).items()):
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if "dropout" in key or "pdrop" in key:
                setattr(one, key, share)
                found = True
            elif "layerdrop" in key and share == 0:
                setattr(one, key, share)
    if share and not found:
        text = f"{share} has no place in the model's configuration; leave it out"
        raise InputError("the recipe", [Problem("model.dropout", text)])


def drops_out(module: Any) -> bool:
    """Whether a module is dropout, or has a share of it (or of left-out blocks) as an attribute."""
    if "dropout" in type(module).__name__.lower():
        return float(module.p) > 0
    return any(
        ("dropout" in name or "layerdrop" in name) and isinstance(value, float) and value > 0
        for name, value in vars(module).items()
    )
