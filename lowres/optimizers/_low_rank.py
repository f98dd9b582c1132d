"""What the optimizers share that hold the moments of a matrix in a smaller space."""

from __future__ import annotations

import math
from typing import Any

import torch

from lowres.optimizers._decay import decays


class LowRank(torch.optim.Optimizer):
    """AdamW, but for groups with a `rank`, whose matrices subclasses update.

    States of a matrix (n, m) with n <= m: two moments (r, m), and what the subclass adds.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                p.mul_(1 - group["lr"] * group["weight_decay"])
                if group["rank"] is None:
                    p.add_(direction(state, p.grad, group), alpha=-group["lr"])
                else:
                    change = self.change(p, state, group)
                    p.add_(change, alpha=-group["lr"] * group["scale"])
                    del change

    def change(
        self, p: torch.nn.Parameter, state: dict[str, Any], group: dict[str, Any]
    ) -> torch.Tensor:
        """What is taken off a matrix, times learning rate and scale."""
        raise NotImplementedError


def direction(state: dict[str, Any], gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Adam's direction, of the gradient's shape."""
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(gradient)
        state["exp_avg_sq"] = torch.zeros_like(gradient)
    first, second = group["betas"]
    mean = state["exp_avg"].lerp_(gradient, 1 - first)
    square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    root = square.sqrt().div_(math.sqrt(1 - second ** state["step"])).add_(group["eps"])
    return torch.div(mean, root, out=root).div_(1 - first ** state["step"])


class Galore(LowRank):
    """The projection is made of the gradient's leading singular vectors, every `interval` steps."""

    def change(
        self, p: torch.nn.Parameter, state: dict[str, Any], group: dict[str, Any]
    ) -> torch.Tensor:
        gradient, rank = p.grad, group["rank"]
        assert gradient is not None
        tall = gradient.shape[0] > gradient.shape[1]
        if (state["step"] - 1) % group["interval"] == 0:
            left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
            kept = right[:rank].t() if tall else left[:, :rank]
            state["projection"] = kept.to(gradient.dtype, copy=True)
            del left, right, kept
        onto: torch.Tensor = state["projection"]
        if tall:
            return direction(state, gradient @ onto, group) @ onto.t()
        return onto @ direction(state, onto.t() @ gradient, group)


class Apollo(LowRank):
    """The projection is random, drawn from a seed at each step; it only tells how to scale."""

    def __init__(self, groups: Any, seed: int, **defaults: Any) -> None:
        super().__init__(groups, defaults)
        everything = [p for group in self.param_groups for p in group["params"]]
        self._seeds = {id(p): seed * 1_000_003 + 10_007 * n for n, p in enumerate(everything)}

    def change(
        self, p: torch.nn.Parameter, state: dict[str, Any], group: dict[str, Any]
    ) -> torch.Tensor:
        gradient, rank = p.grad, group["rank"]
        assert gradient is not None
        tall = gradient.shape[0] > gradient.shape[1]
        turn = (state["step"] - 1) // group["interval"]
        generator = torch.Generator(p.device).manual_seed(self._seeds[id(p)] + turn)
        onto = torch.randn(
            min(gradient.shape), rank, generator=generator, dtype=gradient.dtype, device=p.device
        ).div_(math.sqrt(rank))
        small = gradient @ onto if tall else onto.t() @ gradient
        del onto
        scaled = direction(state, small, group)
        if group["scaling"] == "channel":
            along = 1 if tall else 0
            factor = scaled.norm(dim=along, keepdim=True)
            factor = factor / small.norm(dim=along, keepdim=True).add_(1e-8)
        else:
            factor = scaled.norm() / small.norm().add_(1e-8)
        change: torch.Tensor = gradient * factor
        norm = change.norm()
        if "norm" in state:
            # Growth is limited without looking at the values, which would wait for the device.
            over = (norm / (state["norm"] * group["growth"])).clamp_(min=1.0)
            # Nothing grows from 0, the norm of an adapter's A while its B is 0.
            over.masked_fill_(state["norm"] == 0, 1.0)
            change.div_(over)
            norm = norm / over
        state["norm"] = norm
        return change


def groups_of(
    parameters: Any, rank: int, weight_decay: float, embedding: Any
) -> list[dict[str, Any]]:
    """Matrices of the blocks with both sides above the rank; other matrices; vectors."""
    parts: dict[tuple[bool, bool], list[Any]] = {}
    for name, p in parameters:
        low = p.ndim == 2 and min(p.shape) > rank and embedding.search(name) is None
        parts.setdefault((low, decays(p)), []).append(p)
    return [
        {"params": ps, "rank": rank if low else None, "weight_decay": weight_decay if wide else 0.0}
        for (low, wide), ps in parts.items()
    ]
