"""Scores of single weights by gradients, and the choice of the highest.

Legend: o output features, i input features, N positions, n entries.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from lowres.core.choosing import Choosing
from lowres.core.errors import LowresError
from lowres.core.parts import part

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.delta import Piece
    from lowres.core.example import Batch
    from lowres.core.learner import Learner
    from lowres.core.sample import Sample

ShareOfWeights = Annotated[float, Field(gt=0, le=1)]
PARTS = 16
"""A gradient is made in so many parts, by rows."""


@part
class Sparse(Choosing):
    """A share of the weights of linear layers in the trained blocks.

    Args:
        share: Of the weights, that train.
        targets: `all-linear`, `paper` (queries and values), or layer names joined by `+`.
    """

    share: ShareOfWeights = 0.005
    targets: str = "all-linear"

    def paths(self, model: nn.Module, blocks: Blocks) -> list[str]:
        """The layers whose weights may be chosen."""
        from lowres.bridges import peft

        return peft.linear_paths(model, blocks, self.targets)

    def expected(self, model: nn.Module, blocks: Blocks) -> Mapping[str, int]:
        from lowres.core.delta import features

        sizes = {
            path: math.prod(features(model.get_submodule(path)))
            for path in self.paths(model, blocks)
        }
        return {path: floor(self.share, size) for path, size in sizes.items()}

    def pieces(self, model: nn.Module, blocks: Blocks) -> Sequence[Piece]:
        """Asked for by PEFT, where a config does not say what goes where."""
        raise self.needs_data()

    def put(self, model: nn.Module, blocks: Blocks, counts: Mapping[str, int]) -> nn.Module:
        from lowres.bridges import peft_tuner
        from lowres.core.delta import Piece
        from lowres.core.parts import values
        from lowres.methods._sparse import SparseDelta

        alike: dict[int, list[str]] = {}
        for path, count in counts.items():
            alike.setdefault(count, []).append(path)
        pieces = [Piece(SparseDelta, paths, {"n": count}) for count, paths in alike.items()]
        return peft_tuner.inject_pieces(model, blocks, self.name, values(self), pieces)

    def merge(self, model: nn.Module) -> nn.Module:
        from lowres.bridges import peft

        return peft.merge(model)


def floor(share: float, size: int) -> int:
    """How many of so many entries; at least one."""
    return max(1, int(share * size))


def sums(
    learner: Learner, sample: Sample, batches: Iterable[Batch], paths: Sequence[str],
    power: Literal[1, 2],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Sum over batches of a power of the gradient of a batch's mean loss, for each entry.

    The gradient of a layer is made from its inputs and its outputs' gradients, whatever its weights
    are held in, and a part of it at a time; the sums lie in host memory in float32.
    """
    import torch

    from lowres.core import host
    from lowres.core.delta import features
    from lowres.core.sample import untrained

    device = next(learner.base.parameters()).device
    layers = {path: learner.base.get_submodule(path) for path in paths}
    with host.memory():
        found = {
            path: host.mark(torch.zeros(math.prod(features(layer))))
            for path, layer in layers.items()
        }
    for batch in batches:
        with untrained(learner.base), _watched(layers, found, power):
            loss: Any = sample.loss(learner, {k: v.to(device) for k, v in batch.items()})
            loss.backward()
            del loss
    return found


@contextlib.contextmanager
def _watched(
    layers: Mapping[str, nn.Module], found: Mapping[str, torch.Tensor], power: Literal[1, 2]
) -> Iterator[None]:
    called: set[str] = set()

    def through(
        path: str, _: nn.Module, inputs: Sequence[torch.Tensor], output: torch.Tensor
    ) -> None:
        if path in called:
            raise LowresError(f"{path} works twice in a pass: one gradient is not to be told apart")
        called.add(path)
        if not output.requires_grad:
            output.requires_grad_(True)  # The lowest layers: backward ends here.
        watch: Any = output.register_hook
        watch(functools.partial(_add, found[path], inputs[0].detach(), power))

    handles = [
        layer.register_forward_hook(functools.partial(through, path))
        for path, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(
    into: torch.Tensor, inputs: torch.Tensor, power: Literal[1, 2], gradient: torch.Tensor
) -> None:
    """Add dY^T x, or its squares, a few rows at a time."""
    dy_No = gradient.flatten(0, -2)
    x_Ni = inputs.flatten(0, -2).to(dy_No.dtype)
    o, i = dy_No.shape[1], x_Ni.shape[1]
    step = -(-o // PARTS)
    for start in range(0, o, step):
        part_oi = (dy_No[:, start : start + step].t() @ x_Ni).float()
        if power == 2:
            part_oi.square_()
        into[start * i : start * i + part_oi.numel()] += part_oi.flatten().to(into.device)


def least_of_highest(scores: Iterable[torch.Tensor], count: int) -> torch.Tensor:
    """The least of the `count` highest scores, each tensor a part of them."""
    import torch

    best: torch.Tensor | None = None
    for scored in scores:
        top = _top(scored, count)
        best = top if best is None else _top(torch.cat([best, top]), count)
    assert best is not None
    return best.min()


def highest(scores: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """The places of the `count` highest scores of all matrices together; of equal ones the first.

    What is held beside the scores is as large as the choice, and one matrix.
    """
    import torch

    threshold = least_of_highest(scores.values(), count)
    left = count - sum(int((scored > threshold).sum()) for scored in scores.values())
    chosen = {}
    for path, scored in scores.items():
        taken = scored > threshold
        equal = (scored == threshold).nonzero().flatten()[:left]
        left -= len(equal)
        taken[equal] = True
        places = taken.nonzero().flatten()
        if len(places):
            chosen[path] = places.to(torch.int32)
    return chosen


def highest_of_each(scores: Mapping[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """The places of the highest scores of each matrix."""
    import torch

    return {
        path: scored.topk(floor(share, scored.numel()), sorted=False).indices.sort().values.to(
            torch.int32
        )
        for path, scored in scores.items()
    }  # fmt: skip


def stop_at_infinite(name: str, scores: Mapping[str, torch.Tensor]) -> None:
    """Raise LowresError where a score is no number, by which nothing can be chosen."""
    odd = [path for path, scored in scores.items() if not bool(scored.isfinite().all())]
    if odd:
        raise LowresError(
            f"method '{name}' cannot choose: gradients of {odd[0]} are not finite; look at the "
            "loss of the model as it is, or hold it in a wider type (model.dtype)"
        )


def stop_at_nothing(name: str, scores: Mapping[str, torch.Tensor]) -> None:
    """Raise LowresError where no score is other than 0: places would be chosen by chance."""
    if not any(bool(scored.any()) for scored in scores.values()):
        raise LowresError(
            f"method '{name}' cannot choose: no gradient reaches any matrix; look whether "
            "loop.max_length cuts the targets off, or hold the model in a wider type (model.dtype)"
        )


def _top(values: torch.Tensor, count: int) -> torch.Tensor:
    return values if values.numel() <= count else values.topk(count, sorted=False).values
