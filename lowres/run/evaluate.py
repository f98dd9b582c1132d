"""Predict every row of the splits to score, on all processes,
and score them beside the baseline.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowres.core import metrics
from lowres.core.example import Example, Prediction, Row, collate
from lowres.core.recipe import Recipe
from lowres.core.record import Score
from lowres.memory.meter import Meter

if TYPE_CHECKING:
    from lowres.core.learner import Learner
    from lowres.making.data import Data


def evaluate(
    recipe: Recipe,
    learner: Learner,
    data: Data,
    accelerator: Any,
    meter: Meter,
    step: int,
    output: Path,
    held: Callable[[], Iterable[torch.Tensor]],
    micro_batch_size: int,
) -> list[Score]:
    """Score the splits that the recipe names.

    Args:
        step: Updates made so far; stands in each score and file name.
        output: Predictions go to `<output>/predictions/<split>-<step>.jsonl`.
        held: Tensors alive before, for the memory probe on the longest batch.
        micro_batch_size: In use; as many rows are scored at once where the recipe does not say.
    """
    # Data-parallel wrappers synchronise buffers in forward, and processes may have different
    # numbers of batches: evaluation asks the model itself.
    learner = dataclasses.replace(learner, module=learner.base)
    learner.base.eval()
    size = recipe.loop.eval_batch_size or micro_batch_size
    scores = []
    for split, (examples, rows) in data.evaluation.items():
        predictions = _predict(recipe, learner, rows, size, accelerator, meter, held)
        file = _write(output, split, step, examples, predictions, recipe, accelerator)
        scores += _score(recipe, split, step, data.train_examples, examples, predictions, file)
    return scores


@torch.no_grad()
def _predict(
    recipe: Recipe,
    learner: Learner,
    rows: Sequence[Row],
    size: int,
    accelerator: Any,
    meter: Meter,
    held: Callable[[], Iterable[torch.Tensor]],
) -> list[Prediction]:
    from lowres.bridges import accelerate, deepspeed

    side = recipe.objective.padding_side("predict", recipe.task, learner.kind)
    # Longest first: little padding, and lack of memory shows in the first batch.
    order = sorted(range(len(rows)), key=lambda i: -rows[i].length)
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    done: list[tuple[int, Prediction]] = []
    pad_id = int(learner.tokenizer.pad_token_id)
    # Where weights are divided, every process must make the same passes, so each makes all.
    together = deepspeed.partitions_weights(learner.base)
    own = batches[accelerator.process_index :: accelerator.num_processes]
    for number, members in enumerate(batches if together else own):
        batch = collate([rows[i] for i in members], pad_id, side)
        batch = {k: v.to(accelerator.device) for k, v in batch.items()}
        with meter.phase("evaluate", held if number == 0 else None), accelerator.autocast():
            predicted = recipe.objective.predict(learner, batch, recipe.task)
        done += zip(members, predicted, strict=True)
    if not together:
        done = accelerate.gather(accelerator, done)
    return [p for _, p in sorted(done, key=lambda pair: pair[0])]


def _score(
    recipe: Recipe,
    split: str,
    step: int,
    train: Sequence[Example],
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    file: str | None,
) -> list[Score]:
    task = recipe.task
    found = dict(task.score(examples, predictions))
    constant = task.baseline(train, examples)
    majority = task.score(examples, [constant] * len(examples)) if constant is not None else {}
    for remark in predictions[0].remarks:
        found[remark] = metrics.mean([p.remarks[remark] for p in predictions])
    ordered = sorted(found.items(), key=lambda item: item[0] != task.metric)
    return [
        Score(
            split=split,
            metric=name,
            value=metric.value,
            stderr=metric.stderr,
            n=len(predictions),
            majority=majority[name].value if name in majority else None,
            step=step,
            file=file,
        )
        for name, metric in ordered
    ]


def _write(
    output: Path,
    split: str,
    step: int,
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    recipe: Recipe,
    accelerator: Any,
) -> str | None:
    if recipe.task.asks == "likelihood" or not accelerator.is_main_process:
        return None
    name = f"predictions/{split}-{step}.jsonl"
    (output / "predictions").mkdir(exist_ok=True)
    with (output / name).open("w", encoding="utf-8") as file:
        for example, prediction in zip(examples, predictions, strict=True):
            gold = example.label if example.label is not None else example.answer
            line = {"id": example.id, "gold": gold, "predicted": prediction.value}
            file.write(json.dumps(line | dict(prediction.remarks)) + "\n")
    return name
