"""The frozen blocks at the bottom of a transformers model: their outputs, and a forward pass that
is given them.

Shapes: B rows, T tokens of a batch, D hidden.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from lowres.bridges.blocks import drops_out
from lowres.bridges.peft import unwrap_adapted
from lowres.core.errors import InputError, LowresError, Problem

if TYPE_CHECKING:
    from lowres.core.example import Batch
    from lowres.core.learner import Learner

_NEAREST = "freeze more from the input (freezing: {name: prefix, frozen: N}), or drop the lever"


@dataclass
class Prefix:
    """The blocks below the lowest trained one, with all that comes before them.

    Args:
        base: What is called.
        model: The transformers model in it, with or without adapters.
        stack: All blocks of the stack that takes the input.
        names: Paths of the frozen ones at its bottom.
        stem: Paths of the embeddings.
        ran: Paths of the modules that took part. Known after `states`, as is `further`: how many
            results a block hands on beside the hidden states, None where nothing but them.
    """

    base: nn.Module
    model: Any
    stack: nn.ModuleList
    names: tuple[str, ...]
    stem: tuple[str, ...]
    ran: frozenset[str] = frozenset()
    further: int | None = None

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights and persistent buffers that the outputs depend on; what packs weights, too."""
        inside = tuple(f"{path}." for path in (*self.names, *self.stem))
        for name, tensor in self.model.state_dict().items():
            if name.startswith(inside) or name.rpartition(".")[0] in self.ran:
                if isinstance(tensor, torch.Tensor):
                    yield name, tensor

    def stop_if_trained(self) -> None:
        """Raise LowresError when something trains a block that was frozen before."""
        blocks = zip(self.names, self.stack, strict=False)
        if any(p.requires_grad for _, block in blocks for p in block.parameters()):
            raise LowresError(
                "blocks whose outputs are kept on disk became trained while the run went on; drop "
                "the lever 'frozen_prefix_cache'"
            )

    def states(self, inputs: Batch) -> torch.Tensor:
        """What the last of the blocks hands on, (B, T, D).

        Raises:
            InputError: When the blocks hand on more than that to those above, or drop out.
        """
        count = len(self.names)
        made: list[torch.Tensor] = []
        ran: list[nn.Module] = []
        body = self.model.base_model
        if getattr(self.model.config, "is_encoder_decoder", False):
            body = self.model.get_encoder()

        def note(module: nn.Module, _: Any) -> None:
            if not made:
                ran.append(module)

        def take(_: nn.Module, __: Any, out: Any) -> None:
            made.append(out if isinstance(out, torch.Tensor) else out[0])
            self.further = None if isinstance(out, torch.Tensor) else len(out) - 1
            if self.further and count < len(self.stack):
                self._stop_at_further(out[1:])

        above = {i: _Skipped(self, i) for i in range(count, len(self.stack))}
        handles = [
            self.stack[count - 1].register_forward_hook(take),
            nn_module.register_module_forward_pre_hook(note),
        ]
        try:
            with _replaced(self.stack, above):
                # Models draw random numbers between blocks even where no share is dropped.
                with torch.random.fork_rng(_cards(inputs)):
                    body(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        self.ran = frozenset(self._stop_at_dropout(ran))
        (states,) = made
        return states

    def _stop_at_further(self, beside: Sequence[Any]) -> None:
        if any(isinstance(value, torch.Tensor) for value in beside):
            refuse(
                f"{type(self.stack[0]).__name__} hands on more than hidden states, which the next "
                f"block would miss; freeze all {len(self.stack)} blocks of its stack, or drop the "
                "lever"
            )

    def _stop_at_dropout(self, ran: Sequence[nn.Module]) -> list[str]:
        """The modules' paths. Raises InputError when one of them is dropout."""
        paths = {id(module): path for path, module in self.model.named_modules()}
        found = [paths.get(id(m), type(m).__name__) for m in ran if drops_out(m)]
        if found:
            refuse(
                f"there is dropout in the frozen part ({found[0]}), so that each pass gives other "
                "outputs; set model.dropout to 0"
            )
        return [paths[id(m)] for m in ran if id(m) in paths]


def frozen_prefix(learner: Learner) -> Prefix:
    """The frozen blocks at the bottom of a learner's model, as `requires_grad` says.

    Raises:
        InputError: When the lowest block is trained, something before it, or there is dropout.
    """
    model: Any = unwrap_adapted(learner.base)
    names = learner.blocks.names
    parent = names[0].rpartition(".")[0]
    stack = model.get_submodule(parent)
    inside = {id(p) for p in model.parameters()}
    stem = [name + "." for name in learner.blocks.stem]
    for name, parameter in learner.base.named_parameters():
        if parameter.requires_grad and id(parameter) not in inside:
            refuse(f"{name} is trained outside of the model, at its input; drop the lever")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(name.startswith(s) for s in stem):
            refuse(f"{name} is trained, which lies below all blocks; {_NEAREST}")
    count = 0
    for block in stack:
        if any(p.requires_grad for p in block.parameters()):
            break
        count += 1
    if count == 0:
        refuse(f"the lowest block ({names[0]}) is trained; {_NEAREST}")
    prefix = Prefix(learner.base, model, stack, names[:count], learner.blocks.stem)
    prefix._stop_at_dropout([m for block in stack[:count] for m in block.modules()])
    return prefix


def begin_above(
    prefix: Prefix, column: str, states: Callable[[torch.Tensor, Batch], torch.Tensor]
) -> None:
    """Let each forward pass whose batch has a column of that name begin above the prefix.

    Args:
        states: The column (B, T) and the rest of the batch, to the hidden states (B, T, D).
    """
    open_passes: list[contextlib.ExitStack] = []

    def before(_: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        replaced = contextlib.ExitStack()
        open_passes.append(replaced)
        where = given.pop(column, None)
        if where is not None:
            found = states(where, given)
            modules = {i: _Skipped(prefix, i) for i in range(len(prefix.names))}
            modules[0].given = found
            replaced.enter_context(_replaced(prefix.stack, modules))
        return args, given

    def after(_: nn.Module, __: Any, ___: Any) -> None:
        # None where the hook before raised.
        if open_passes:
            open_passes.pop().close()

    prefix.base.register_forward_pre_hook(before, with_kwargs=True)
    prefix.base.register_forward_hook(after, always_call=True)


class _Skipped(nn.Module):
    """Stands where a block stood: hands on the hidden states it is called with, or those given.

    Args:
        at: The block's place in the stack.
    """

    def __init__(self, prefix: Prefix, at: int) -> None:
        super().__init__()
        object.__setattr__(self, "block", prefix.stack[at])
        self.prefix = prefix
        self.given: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        # Some models ask a block for the kind of its attention.
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.given is not None:
            hidden, self.given = self.given, None
        further = self.prefix.further
        return hidden if further is None else (hidden, *[None] * further)


@contextlib.contextmanager
def _replaced(stack: nn.ModuleList, modules: dict[int, Any]) -> Iterator[None]:
    """Other blocks in a stack while the block runs."""
    before = {at: stack._modules[str(at)] for at in modules}
    stack._modules.update({str(at): module for at, module in modules.items()})
    try:
        yield
    finally:
        stack._modules.update({str(at): module for at, module in before.items()})


def digest_of(prefix: Prefix, tokenizer: Any, device: torch.device) -> dict[str, str]:
    """What decides on the outputs of the prefix beside the rows, each in few characters."""
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in prefix.tensors():
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # By way of the CPU, and piece by piece: not every type of a weight has a numpy type.
        for piece in tensor.detach().reshape(-1).split(1 << 24):
            weights.update(piece.cpu().contiguous().view(torch.uint8).numpy())
    config = {k: v for k, v in prefix.model.config.to_dict().items() if not k.startswith("_")}
    kind = device.type
    autocast = torch.is_autocast_enabled(kind)
    words = json.dumps([tokenizer.get_vocab(), tokenizer.special_tokens_map],
                       sort_keys=True, default=str)  # fmt: skip
    return {
        "weights": weights.hexdigest(),
        "config": _short(json.dumps(config, sort_keys=True, default=str)),
        "tokenizer": _short(words),
        "attention": str(getattr(prefix.model.config, "_attn_implementation", "")),
        "blocks": " ".join(prefix.names),
        "modules": _short(
            " ".join(
                type(m).__name__ for b in prefix.stack[: len(prefix.names)] for m in b.modules()
            )
        ),  # fmt: skip
        "device": kind,
        "autocast": str(torch.get_autocast_dtype(kind)) if autocast else "no",
        "matmul": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _short(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _cards(inputs: Batch) -> list[int]:
    places = {tensor.device for tensor in inputs.values() if tensor.device.type == "cuda"}
    return [torch.cuda.current_device() if p.index is None else p.index for p in places]


def refuse(why: str) -> NoReturn:
    """Raise the lever's InputError."""
    raise InputError("the recipe", [Problem("levers", f"'frozen_prefix_cache': {why}")])
