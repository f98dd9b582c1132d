"""Step time and memory of the loop beside a bare PyTorch loop and transformers.Trainer with PEFT.

    python benchmarks/peers/trainer.py recipes/cola/minilm-lora-cpu.yaml --rounds 6 --updates 10

The three take turns in one process, a block of updates each, on the same rows, with a prepared
model of their own from the same recipe. Printed and recorded: the ratio of the medians of whole
updates, and the peak of live bytes of one update after the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import lowres
from lowres.bridges import accelerate
from lowres.core.reading import load_recipe
from lowres.memory.live import LiveBytes, tensors_of
from lowres.memory.meter import Meter
from lowres.run import environment, measuring, session
from lowres.run.progress import Reporter

RECORDS = Path(__file__).resolve().parent.parent / "records" / "peers"


class Lowres:
    """The session's own update."""

    def __init__(self, recipe: Any, folder: Path) -> None:
        self.built = lowres.build(recipe)
        accelerator = accelerate.make(recipe)
        module, optimizer = accelerator.prepare(self.built.model, self.built.optimizer)
        self.built.learner.module = module
        self.optimizer = optimizer
        engine = recipe.optimizer.engine(accelerator, self.built.learner, optimizer)
        self.session = session.TrainingSession(
            recipe=recipe, learner=self.built.learner, engine=engine, data=self.built.inputs.data,
            accelerator=accelerator, meter=Meter(accelerator.device), reporter=Reporter(quiet=True),
            output=folder, started=time.monotonic(), evaluate=lambda step: [], resume=None,
            rotation=self.built.rotation, largest=(),
        )  # fmt: skip
        # Its own probes on the first updates must not fall into a timed block.
        self.session.measuring.made = measuring.PROBED_UPDATES
        self.step = 0

    def update(self, rows: Sequence[Any]) -> None:
        self.session.update(self.step, rows)
        self.step += 1

    def block(self, batches: Sequence[Sequence[Any]]) -> list[float]:
        return [timed(self.update, rows) for rows in batches]


class Bare:
    """What one would write by hand for this recipe: forward, backward, clip, step."""

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe
        self.built = lowres.build(recipe)
        self.optimizer = self.built.optimizer
        self.model = self.built.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.autocast = recipe.loop.precision == "bf16"

    def update(self, rows: Sequence[Any]) -> None:
        size = self.recipe.loop.micro_batch_size
        for start in range(0, len(rows), size):
            batch = self.built.collator(rows[start : start + size])
            labels = batch.pop("labels")[:, 0]
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                logits = self.model(**batch).logits
                total = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
            (total / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.recipe.loop.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def block(self, batches: Sequence[Sequence[Any]]) -> list[float]:
        return [timed(self.update, rows) for rows in batches]


class Trainer:
    """transformers.Trainer over the same prepared model; an update is timed from end to end."""

    def __init__(self, recipe: Any, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.built = lowres.build(recipe)

    def block(self, batches: Sequence[Sequence[Any]]) -> list[float]:
        import transformers

        loop = self.recipe.loop
        times: list[float] = []

        class Clock(transformers.TrainerCallback):  # type: ignore[misc]
            last = 0.0

            def on_step_end(self, *_: Any, **__: Any) -> None:
                now = time.perf_counter()
                times.append(now - self.last)
                self.last = now

        class InOrder(transformers.Trainer):  # type: ignore[misc]
            def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
                return torch.utils.data.SequentialSampler(self.train_dataset)

        # One update more than is counted: the first has no end of an update before it.
        rows = [row for batch in [batches[0], *batches] for row in batch]
        arguments = transformers.TrainingArguments(
            output_dir=str(self.folder), max_steps=len(batches) + 1, report_to="none",
            learning_rate=self.recipe.optimizer.lr, use_cpu=True, bf16=loop.precision == "bf16",
            per_device_train_batch_size=loop.micro_batch_size, disable_tqdm=True,
            gradient_accumulation_steps=loop.accumulation, save_strategy="no",
            logging_steps=1, remove_unused_columns=False, dataloader_pin_memory=False,
            max_grad_norm=loop.max_grad_norm, weight_decay=0.0,
        )  # fmt: skip
        trainer = InOrder(
            model=self.built.model, args=arguments, train_dataset=rows,
            data_collator=self.built.collator, callbacks=[Clock()],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return times[1:]


def timed(update: Callable[[Sequence[Any]], None], rows: Sequence[Any]) -> float:
    start = time.perf_counter()
    update(rows)
    return time.perf_counter() - start


def peak_live_bytes(contender: Lowres | Bare, rows: Sequence[Any]) -> int:
    """Of one update, with optimizer states there."""
    with LiveBytes("cpu", tensors_of(contender.built.model, contender.optimizer)) as counted:
        contender.update(rows)
    return counted.peak_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--updates", type=int, default=10, help="updates in a block")
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/peers/")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, ["loop.epochs=1", "task.eval_examples=8"])
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "lowres").mkdir()
        contenders: dict[str, Any] = {
            "bare": Bare(recipe),
            "lowres": Lowres(recipe, Path(scratch) / "lowres"),
            "trainer": Trainer(recipe, Path(scratch) / "trainer"),
        }
        rows = contenders["bare"].built.train_rows
        size = recipe.loop.global_batch_size
        batches = [rows[i * size :][:size] for i in range(arguments.updates)]
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(arguments.rounds + 1):
            # Each round begins with another contender, so that none always follows the same one.
            names = list(contenders)
            for name in names[number % 3 :] + names[: number % 3]:
                block = contenders[name].block(batches)
                if number:  # the first round warms up
                    times[name] += block
        peaks = {name: peak_live_bytes(contenders[name], batches[0]) for name in ("bare", "lowres")}
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "recipe": Path(arguments.recipe).stem,
        "n": len(times["bare"]),
        "median_seconds": medians,
        "quartiles_seconds": {n: statistics.quantiles(v, n=4) for n, v in times.items()},
        "lowres_over_bare": medians["lowres"] / medians["bare"],
        "lowres_over_trainer": medians["lowres"] / medians["trainer"],
        "peak_live_bytes": peaks,
        "peak_lowres_over_bare": peaks["lowres"] / peaks["bare"],
        "environment": environment.describe(torch.device("cpu"), 1),
    }
    print(json.dumps({k: v for k, v in result.items() if k != "environment"}, indent=1))
    if arguments.record:
        target = RECORDS / "cpu" / f"trainer-{result['recipe']}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
