"""`lowres run` against transformers.Trainer (with PEFT) over the same prepared model,
rows and order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowres
from lowres.making.data import Order


class ListSampler(torch.utils.data.Sampler[int]):
    def __init__(self, order: list[int]) -> None:
        self.order = order

    def __iter__(self) -> Any:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def trainer_losses(recipe: Any, folder: Path) -> list[float]:
    """Loss of each update as the Trainer computes it: its micro-batch losses summed."""
    from transformers import Trainer, TrainingArguments

    built = lowres.build(recipe)
    loop = recipe.loop
    order = Order(
        [r.length for r in built.train_rows], loop.global_batch_size, loop.steps, loop.seed
    )
    rows = [i for step in range(loop.steps) for i in order.rows(step)]
    micro: list[float] = []

    class Recording(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return ListSampler(rows)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            micro.append(float(loss))
            return loss

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=loop.steps, learning_rate=recipe.optimizer.lr,
        per_device_train_batch_size=loop.micro_batch_size,
        gradient_accumulation_steps=loop.accumulation, lr_scheduler_type=loop.schedule,
        warmup_steps=round(loop.warmup_ratio * loop.steps), max_grad_norm=loop.max_grad_norm,
        weight_decay=0.0, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        logging_strategy="no", remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip

    # Version 5.23 leaves the mean loss of a classification micro-batch undivided under accumulation
    # (its model takes `num_items_in_batch` and ignores it), so the right division is handed to it.
    def divided(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        total = torch.nn.functional.cross_entropy(outputs.logits, labels[:, 0], reduction="sum")
        return total / num_items_in_batch

    # The data set repeats, so that the sampler's order may run over several passes.
    trainer = Recording(
        model=built.model, args=arguments, train_dataset=list(built.train_rows),
        data_collator=built.collator, processing_class=built.tokenizer,
        compute_loss_func=divided if built.learner.head == "classification" else None,
    )  # fmt: skip
    trainer.train()
    size = loop.accumulation
    return [sum(micro[i : i + size]) for i in range(0, len(micro), size)]


@pytest.mark.parametrize("method", ["full", {"name": "lora", "targets": "all-linear"}],
                         ids=["full", "lora"])  # fmt: skip
@pytest.mark.parametrize(
    "kind, objective", [("decoder", "next_token"), ("encoder", "classification")]
)
def test_losses_equal_those_of_the_trainer(
    kind: str, objective: str, method: Any, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Reference: transformers.Trainer with padding and accumulation, to 1e-5."""
    task: Any = {"name": "grammaticality", "train_examples": 48, "eval_examples": 4}
    if objective == "next_token":
        rows = [
            f'{{"question": "{"the old king saw " * (i % 7 + 1)}?", '
            f'"answer": "{"he sings " * (i % 5 + 1)}#### {i}"}}'
            for i in range(48)
        ]
        for split in ("train", "test"):
            (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
        task = {"name": "gsm8k", "folder": str(tmp_path), "eval_examples": 2}
        objective_keys: Any = {"name": "next_token", "max_new_tokens": 4}
    else:
        objective_keys = objective
    one = recipe(
        kind, task=task, objective=objective_keys, method=method,
        optimizer={"name": "adamw", "lr": 5e-3},
        loop={"steps": 6, "micro_batch_size": 2, "global_batch_size": 8, "warmup_ratio": 0.34,
              "max_length": 48},
    )  # fmt: skip
    assert len({r.length for r in lowres.build(one).train_rows}) > 3, "nothing would be padded"
    ours = lowres.run(one, output_folder=tmp_path / "ours", quiet=True, plan=False).losses
    theirs = trainer_losses(one, tmp_path / "theirs")
    assert len(ours) == 6
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours[0] != pytest.approx(ours[-1], abs=1e-3), "nothing was learned: nothing is compared"
