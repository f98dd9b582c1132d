"""Run the feed-forward part of each block on a few tokens at a time, and once more in backward.

Paper: Arctic Long Sequence Training, Bekman et al. 2025 (section 3.1.1).
https://arxiv.org/abs/2506.13996

Departs from the paper: tiles are cut from the tokens of all rows, and recomputed by torch's
non-reentrant checkpointing, so that gradients flow although the weights may be frozen.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lowres.core.errors import InputError
from lowres.core.parts import Circumstance, Lever, PositiveInt, part

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.learner import Learner

_METHODS = ("feed_forward_chunk", "ff_chunk")
"""What BERT and its kin call their feed-forward part, over several modules, residual included."""


@part
class TiledMlp(Lever):
    """The wide activations of a feed-forward part, (B x T, F), are there for one tile at a time.

    Beside `int8_weights` on CUDA the features multiplied in 16 bits are chosen tile by tile.

    Args:
        tiles: Into how many slices the tokens of a micro-batch are cut.
    """

    brings: ClassVar[frozenset[Circumstance]] = frozenset({"tiled"})
    effect: ClassVar[Literal["exact", "lossy"]] = "exact"
    searched: ClassVar[int | None] = 1

    tiles: PositiveInt = 4

    def on_learner(self, learner: Learner) -> Learner:
        from lowres.bridges import blocks, peft

        model = peft.unwrap_adapted(learner.base)
        for name in learner.blocks.names:
            owner, method, inside = self._feed_forward(peft.bare(model.get_submodule(name)), name)
            if any(blocks.drops_out(module) for part in inside for module in part.modules()):
                self._refuse(f"there is dropout inside of the feed-forward part of {name}, whose "
                             "masks would be others in each tile; set it to 0 (in the method, or "
                             "model.dropout)")  # fmt: skip
            setattr(owner, method, tiled(getattr(owner, method), self.tiles))
        return learner

    def _feed_forward(self, block: nn.Module, name: str) -> tuple[nn.Module, str, list[nn.Module]]:
        """Whose function it is, the function's name, and the modules at work in it."""
        if any("expert" in path for path, _ in block.named_modules()):
            self._refuse(f"{name} is a mixture of experts, which takes tokens apart by itself")
        for method in _METHODS:
            if hasattr(block, method):
                parts = [m for n, m in block.named_children() if "attention" not in n]
                return block, method, parts
        # Adapters are two linear layers, too, and at work in the part that is looked for.
        others = [
            m
            for n, m in block.named_modules()
            if "attention" not in type(m).__name__.lower() and "lowres_delta_" not in n
        ]
        found = [m for m in others if m is not block and _is_feed_forward(m)]
        if len(found) != 1:
            self._refuse(f"{name} has {len(found) or 'no'} modules that are a feed-forward part by "
                         "themselves (two linear layers, up and down)")  # fmt: skip
        return found[0], "forward", found

    def _refuse(self, why: str) -> None:
        text = f"lever '{self.name}': {why}; drop the lever, or use gradient_checkpointing"
        raise InputError("the recipe", [text])


def tiled(
    function: Callable[[torch.Tensor], torch.Tensor], tiles: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of tokens (..., D) that goes through them in so many slices."""
    import torch
    from torch.utils.checkpoint import checkpoint

    def slice_by_slice(hidden: torch.Tensor) -> torch.Tensor:
        # Every slice has three dimensions and is contiguous, however many rows there are.
        tokens_1ND = hidden.reshape(1, -1, hidden.shape[-1])
        slices = torch.chunk(tokens_1ND, tiles, dim=1)
        if torch.is_grad_enabled():
            # Without dropout no random state needs to be kept.
            again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            done = [checkpoint(function, each, **again) for each in slices]
        else:
            done = [function(each) for each in slices]
        together = torch.cat(done, dim=1)
        return together.view(*hidden.shape[:-1], together.shape[-1])

    return slice_by_slice


def _is_feed_forward(module: nn.Module) -> bool:
    """Whether it takes one tensor, and every linear layer in it goes from or to the same width."""
    widths = list(_widths(module))
    arguments = inspect.signature(type(module).forward).parameters.values()
    taken = [a for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)]
    if len(widths) < 2 or len(taken) != 2:
        return False
    outer = {up for up, _ in widths} & {down for _, down in widths}
    return any(all(width in pair for pair in widths) for width in outer)


def _widths(module: nn.Module) -> Iterator[tuple[int, int]]:
    """Input and output features of the linear layers that are its own children."""
    for child in module.children():
        # Adapters around a linear layer say the same as the layer; GPT-2's are named otherwise.
        for given, made in (("in_features", "out_features"), ("nx", "nf")):
            if hasattr(child, given) and hasattr(child, made):
                yield getattr(child, given), getattr(child, made)
                break
