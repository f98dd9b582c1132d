"""Which triplets of AdaLoRA stay. Legend: R triplets of a layer, I and O its features.

Equations are those of https://arxiv.org/abs/2303.10512.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

_KEPT = "kept"
_FACTORS = ("lora_E", "lora_A", "lora_B")
_ADAPTER = "default"


@dataclass(frozen=True)
class Schedule:
    """How many triplets stay after update `made` of `total`, in sums over all layers.

    Args:
        initial, target: Triplets of all layers at first and in the end.
        warm_up, final: Shares of the updates before the first cut and after the last.
        every: Updates between cuts.
    """

    initial: int
    target: int
    warm_up: float
    final: float
    every: int

    def end(self, total: int) -> int:
        """The update with the last cut."""
        return max(1, total - round(self.final * total))

    def budget(self, made: int, total: int) -> int | None:
        """What stays, by equation 13; None where nothing is cut after this update."""
        begin, end = round(self.warm_up * total), self.end(total)
        if made == end:
            return self.target
        if not begin < made < end or made % self.every:
            return None
        left = 1 - (made - begin) / (end - begin)
        return int((self.initial - self.target) * left**3 + self.target)


class Allocator:
    """Importances of what a model trains, and the cuts that follow from them.

    Args:
        beta: Of both moving averages.
    """

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._sensitivity: dict[str, torch.Tensor] = {}
        self._uncertainty: dict[str, torch.Tensor] = {}
        self._kept: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def look(self, model: nn.Module) -> None:
        """Take in the gradients (equations 8 to 10); nothing more once the last cut was made."""
        if self._kept:
            return
        for name, parameter in _parameters(model):
            if parameter.grad is None:
                continue
            if name not in self._sensitivity:
                self._sensitivity[name] = torch.zeros_like(parameter)
                self._uncertainty[name] = torch.zeros_like(parameter)
            smooth = self._sensitivity[name]
            now = (parameter * parameter.grad).abs_()
            smooth.mul_(self._beta).add_(now, alpha=1 - self._beta)
            apart = now.sub_(smooth).abs_()
            self._uncertainty[name].mul_(self._beta).add_(apart, alpha=1 - self._beta)

    @torch.no_grad()
    def cut(self, model: nn.Module, budget: int, *, last: bool) -> None:
        """Set to zero the singular values of all but the `budget` most important triplets.

        Args:
            last: What is cut now is never looked at again.
        """
        layers = dict(_layers(model))
        scores = {path: self._scores(path) for path in layers}
        order = torch.cat(list(scores.values()))
        kept = torch.zeros_like(order, dtype=torch.bool)
        kept.index_fill_(0, order.topk(budget).indices, True)
        parts = torch.split(kept, [len(s) for s in scores.values()])
        masks = dict(zip(layers, parts, strict=True))
        for path, layer in layers.items():
            layer.lora_E[_ADAPTER].mul_(masks[path].unsqueeze(1))
        if last:
            # Their storage is of all layers; each is kept by itself.
            self._kept = {path: mask.clone() for path, mask in masks.items()}
            self._sensitivity, self._uncertainty = {}, {}
            self._tell(model)

    @torch.no_grad()
    def hold(self, model: nn.Module) -> None:
        """After the last cut: what was cut stays at zero, whatever the optimizer did."""
        for path, layer in _layers(model):
            if path in self._kept:
                layer.lora_E[_ADAPTER].mul_(self._kept[path].unsqueeze(1))

    def state(self) -> dict[str, torch.Tensor]:
        kinds = {"sensitivity": self._sensitivity, "uncertainty": self._uncertainty,
                 _KEPT: self._kept}  # fmt: skip
        return {f"{kind}:{n}": t for kind, held in kinds.items() for n, t in held.items()}

    def restore(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        self._sensitivity, self._uncertainty, self._kept = {}, {}, {}
        kinds = {"sensitivity": self._sensitivity, "uncertainty": self._uncertainty,
                 _KEPT: self._kept}  # fmt: skip
        place = next(model.parameters()).device
        for key, tensor in state.items():
            kind, _, name = key.partition(":")
            kinds[kind][name] = tensor.to(place)
        if self._kept:
            self._tell(model)

    def _scores(self, path: str) -> torch.Tensor:
        """Of each triplet of a layer (equation 7), (R,)."""
        e_R1, a_RI, b_OR = (
            self._sensitivity[name] * self._uncertainty[name]
            for name in (f"{path}.{which}" for which in _FACTORS)
        )
        return e_R1[:, 0] + a_RI.mean(1) + b_OR.mean(0)

    def _tell(self, model: Any) -> None:
        """Have PEFT save only what is kept."""
        if not any(is_fake(mask) for mask in self._kept.values()):
            model.peft_config[_ADAPTER].rank_pattern = {
                f"{path}.lora_E.{_ADAPTER}": mask.tolist() for path, mask in self._kept.items()
            }


def orthogonality(model: nn.Module) -> torch.Tensor:
    """Mean of `||P^T P - 1||` and `||Q Q^T - 1||` (Frobenius) over all layers, a scalar."""
    norms = []
    for _, layer in _layers(model):
        a_RI, b_OR = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
        for gram_RR in (a_RI @ a_RI.T, b_OR.T @ b_OR):
            one = torch.eye(len(gram_RR), dtype=gram_RR.dtype, device=gram_RR.device)
            norms.append(torch.linalg.matrix_norm(gram_RR - one))
    return torch.stack(norms).mean()


def layer_count(model: nn.Module) -> int:
    return sum(1 for _ in _layers(model))


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Adapted layers, by their paths in the plain model."""
    for path, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_E") and _ADAPTER in module.lora_E:
            yield path, module


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, layer in _layers(model):
        for which in _FACTORS:
            yield f"{path}.{which}", getattr(layer, which)[_ADAPTER]
