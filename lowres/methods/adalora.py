"""Add a product in the form of a singular value decomposition; cut what matters least, everywhere.

Paper: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, Zhang et al. 2023.
https://arxiv.org/abs/2303.10512

Departs from the paper: the penalty is the mean of norms instead of the sum of their squares (as
PEFT and the authors' code have it); begin and end of the cuts are shares of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from lowres.core.method import Taxonomy
from lowres.core.parts import Circumstance, Guard, PositiveFloat, PositiveInt, Share, part
from lowres.methods._injected import Injected

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.recipe import Recipe
    from lowres.methods._adalora import Schedule


@part
class Adalora(Injected):
    """`y = W x + (alpha / initial_rank) P diag(e) Q x`. Triplets that were cut leave when the
    adapter is saved; until then they are held, and so are their optimizer states.

    Importances are two moving averages as large as what is trained, held until the last cut.

    Args:
        initial_rank: Triplets of each layer at first.
        target_rank: Of a layer in the mean in the end; the paper starts at 1.5 times as many.
        alpha: The product is scaled by alpha / initial_rank.
        warm_up: Share of the updates before the first cut.
        final: Share of the updates after the last cut.
        every: Updates between cuts.
        beta: Of the moving averages.
        penalty_weight: Of the penalty that keeps P and Q near orthogonal.
    """

    taxonomy: ClassVar[Taxonomy] = "reparametrisation"
    # Appendices of the paper: 5e-4 to 2.2e-3.
    learning_rate_hint: ClassVar[tuple[float, float]] = (5e-4, 2e-3)
    refuses: ClassVar[Mapping[Circumstance, str]] = {
        "in_backward": "importance is weight times gradient, and the gradients would be gone when "
        "it is taken; use lora, or updates after the backward pass",
        "without_gradients": "importance is weight times gradient, and none is made; use lora",
        "updated_apart": "importance is weight times gradient, and the gradients are gone when it "
        "is taken; use lora",
        "rotating": "the budget is shared among all layers, of which only some would have "
        "gradients; use lora, or freezing 'prefix'",
    }
    # Written is what the cuts have left.
    waives: ClassVar[frozenset[Guard]] = frozenset({"saved"})
    config: ClassVar[str] = "AdaLoraConfig"

    initial_rank: PositiveInt = 12
    target_rank: PositiveInt = 8
    alpha: PositiveFloat = 16
    warm_up: Share = 0.1
    final: Share = 0.5
    every: PositiveInt = 1
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.85
    penalty_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1

    def check(self, recipe: Recipe) -> Iterator[str]:
        yield from super().check(recipe)
        if self.target_rank >= self.initial_rank:
            yield (
                f"a target_rank of {self.target_rank} cuts nothing from an initial_rank of "
                f"{self.initial_rank}; set initial_rank to {-(-3 * self.target_rank // 2)}, or use "
                "lora"
            )
        if self.warm_up + self.final >= 1:
            yield (
                f"warm_up {self.warm_up:g} and final {self.final:g} leave no update to cut in; "
                "lower them to less than 1 together"
            )
        if recipe.loop.precision == "fp16":
            yield (
                "importance is weight times gradient, and loss scaling (loop.precision fp16) "
                "changes the gradients' scale between updates; set loop.precision to bf16 or no"
            )

    def settings(self) -> Mapping[str, Any]:
        # PEFT's own schedule is not used, and it wants the number of updates here.
        schedule = {"total_step": 1, "target_r": self.target_rank, "init_r": self.initial_rank}
        return {"lora_alpha": self.alpha, **schedule}

    def apply(self, model: nn.Module, blocks: Blocks) -> nn.Module:
        from lowres.methods._adalora import Allocator

        adapted: Any = super().apply(model, blocks)
        # PEFT lets one adapter of this kind train, and counts those that could; this one does, so
        # that others can be loaded beside it.
        adapted.peft_config["default"].inference_mode = True
        adapted.base_model.rankallocator = Allocator(self.beta)
        # PEFT 0.21 has the count of a layer's triplets train over weights in 16 bits.
        for name, count in adapted.named_parameters():
            if ".ranknum." in name:
                count.requires_grad_(False)
        whole: nn.Module = adapted
        return whole

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        from lowres.methods._adalora import orthogonality

        return orthogonality(model) * self.penalty_weight if self.penalty_weight else None

    def after_gradients(self, model: nn.Module, step: int, total: int) -> None:
        self._allocator(model).look(model)

    def after_update(self, model: nn.Module, step: int, total: int) -> None:
        schedule, allocator = self._schedule(model), self._allocator(model)
        budget, end = schedule.budget(step + 1, total), schedule.end(total)
        if budget is not None:
            allocator.cut(model, budget, last=step + 1 == end)
        elif step + 1 > end:
            allocator.hold(model)

    def state(self, model: nn.Module) -> Mapping[str, torch.Tensor]:
        held: Mapping[str, torch.Tensor] = self._allocator(model).state()
        return held

    def restore(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        self._allocator(model).restore(model, state)

    def _allocator(self, model: Any) -> Any:
        return model.base_model.rankallocator

    def _schedule(self, model: nn.Module) -> Schedule:
        from lowres.methods._adalora import Schedule, layer_count

        layers = layer_count(model)
        return Schedule(
            layers * self.initial_rank, layers * self.target_rank, self.warm_up, self.final,
            self.every,
        )  # fmt: skip
