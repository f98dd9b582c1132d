"""The output embeddings of a transformers language model, and what follows them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from lowres.core.errors import InputError

if TYPE_CHECKING:
    import torch


class HeadTaken(nn.Module):
    """Stands where the head stood: keeps what the head would be given, and makes no logits.

    Args:
        head: The module itself, adapters in place; not a child of this one.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "head", head)
        self.hidden: torch.Tensor | None = None
        self.probe: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        # Some models look at the type of the head's weight.
        return super().__getattr__(name) if name != "weight" else self.__dict__["head"].weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Keep the hidden states (B, T, D) and return one of their numbers (1, 1, 1), for what the
        model does behind its head."""
        self.hidden = hidden
        self.probe = hidden.detach()[:1, :1, :1].requires_grad_()
        return self.probe


def head_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The parent of a model's output embeddings, and their name in it.

    Raises:
        InputError: When the model says of none.
    """
    get: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get()
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is head:
                return parent, name
    raise InputError(
        "the recipe",
        [f"{type(model).__name__} does not say which module makes its logits"],
    )


@contextlib.contextmanager
def taken(model: nn.Module) -> Iterator[HeadTaken]:
    """The model's forward makes no logits while the block runs."""
    parent, name = head_of(model)
    head = parent._modules[name]
    assert head is not None
    stand_in = HeadTaken(head)
    parent._modules[name] = stand_in
    try:
        yield stand_in
    finally:
        parent._modules[name] = head


def tail_of(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a model does with its logits (..., V) behind its head.

    Source: `forward` of Granite, Cohere, Gemma 2 and BART in transformers 5.23.
    """
    config = model.config.get_text_config(decoder=True)
    divisor = getattr(config, "logits_scaling", None)
    factor = getattr(config, "logit_scale", None)
    cap = getattr(config, "final_logit_softcapping", None)

    def tail(logits: torch.Tensor) -> torch.Tensor:
        bias = getattr(model, "final_logits_bias", None)
        if bias is not None:
            logits = logits + bias.to(logits.device)[0]
        if divisor is not None:
            logits = logits / divisor
        if factor is not None:
            logits = logits * factor
        if cap is not None:
            logits = (logits / cap).tanh() * cap
        return logits

    return tail


def stop_at_unknown_tail(
    model: nn.Module, probe: torch.Tensor, made: torch.Tensor, expected: torch.Tensor
) -> None:
    """Raise InputError when a model did otherwise with `probe` than `tail_of` says.

    Args:
        made: What the model made of it.
        expected: What the tail made of it.
    """
    ours, theirs = _operations(expected, probe), _operations(made, probe)
    if ours != theirs:
        raise InputError(
            "the recipe",
            [
                f"{type(model).__name__} changes its logits behind its head "
                f"({', '.join(theirs) or 'not at all'}; known: {', '.join(ours) or 'nothing'}), "
                "which cannot be done slice by slice; drop the lever 'chunked_logits'"
            ],
        )


def _operations(tensor: torch.Tensor, source: torch.Tensor) -> list[str]:
    """Names of the operations that led from one tensor to another, types and copies aside."""
    names = []
    node: Any = tensor.grad_fn if tensor is not source else None
    while node is not None and node.next_functions:
        names.append(node.name().removesuffix("Backward0"))
        node = node.next_functions[0][0]
    return [n for n in reversed(names) if n not in ("ToCopy", "Clone")]
