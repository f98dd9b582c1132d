"""The gradients of one update, micro-batch by micro-batch: the part of a step that needs memory."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lowres.bridges import accelerate
from lowres.core.batching import batching_of
from lowres.core.example import Batch, Row, real_tokens

if TYPE_CHECKING:
    from lowres.core.engine import Engine
    from lowres.core.learner import Learner
    from lowres.core.method import Method
    from lowres.core.parts import Objective
    from lowres.core.recipe import Recipe


def micro_batches(recipe: Recipe, learner: Learner, rows: Sequence[Row], size: int) -> list[Batch]:
    """The rows of one process's share of an update as batches of at most `size` rows."""
    side = recipe.objective.padding_side("train", recipe.task, learner.kind)
    pad_id = int(learner.tokenizer.pad_token_id)
    batching = batching_of(recipe)
    return [batching.collate(group, pad_id, side) for group in batching.group(rows, size)]


def make_gradients(
    objective: Objective,
    learner: Learner,
    engine: Engine,
    accelerator: Any,
    batches: Sequence[Batch],
    seed: int,
    only: Container[int] | None = None,
    method: Method | None = None,
) -> tuple[float, float, float]:
    """Make the gradients of the mean loss over the global batch.

    Args:
        seed: Of dropout.
        only: Micro-batches to compute, by number; None for all. The planner leaves out those that
            repeat others.
        method: Whose penalty is added to the mean.

    Returns:
        Sum of the loss (the mean of several passes), targets and real tokens, over all processes.
    """
    tokens = float(sum(real_tokens(b) for b in batches))
    own_targets = float(sum(objective.targets(b) for b in batches))
    targets, tokens = accelerate.sum_over_processes(accelerator, [own_targets, tokens])
    loss_sum = torch.zeros((), dtype=torch.float64)
    passes = 0
    for context in engine.passes():
        passes += 1
        # Dropout is the same in every pass.
        torch.manual_seed(seed)
        with context:
            for number, batch in enumerate(batches):
                if only is not None and number not in only:
                    continue
                batch = {k: v.to(accelerator.device) for k, v in batch.items()}
                with accelerator.autocast():
                    loss = objective.loss(learner, batch)
                alone = loss.detach()
                last = number == len(batches) - 1
                penalty = method.penalty(learner.base) if method is not None and last else None
                if penalty is not None:
                    # Each process adds its part of one; what is reported is the loss alone.
                    loss = loss + penalty * (targets / accelerator.num_processes)
                engine.accumulate(loss, 1.0 / targets, last=last)
                loss_sum += alone.cpu().double()
                del loss, alone, penalty
    (total,) = accelerate.sum_over_processes(accelerator, [float(loss_sum) / passes])
    return total, targets, tokens
