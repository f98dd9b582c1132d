"""From a task's words to rows: draws, held-out rows, encoding, what encoding cut off,
order of updates.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from lowres.core.errors import InputError, Problem
from lowres.core.example import IGNORED, Example, Row
from lowres.core.learner import Encoder
from lowres.core.recipe import Recipe
from lowres.core.record import HELD_OUT, DataReport


@dataclass
class Data:
    """Everything the run reads.

    Args:
        train: Rows to train on.
        train_examples: The examples they came from (the majority baseline counts their labels).
        evaluation: For each split to score, its examples and rows.
        reports: What encoding did to each split.
        remarks: What the user should know before the first update.
    """

    train: list[Row]
    train_examples: list[Example]
    evaluation: dict[str, tuple[list[Example], list[Row]]]
    reports: list[DataReport] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Splits:
    """The examples of every split that the run uses."""

    train: list[Example]
    evaluation: dict[str, list[Example]]


def read(recipe: Recipe) -> Splits:
    """Read and draw all splits.

    Raises:
        InputError: Broken, missing or empty data.
    """
    task = recipe.task
    wanted = _wanted_splits(recipe)
    train, held_out = _draw(recipe, list(task.examples("train")))
    evaluation = {}
    for split in wanted:
        examples = held_out if split == HELD_OUT else list(task.examples(split))
        if task.eval_examples is not None and len(examples) > task.eval_examples:
            # Drawn, not cut off: published files are often sorted by label.
            draw = random.Random(f"evaluate-{task.data_seed}-{split}")
            chosen = sorted(draw.sample(range(len(examples)), task.eval_examples))
            examples = [examples[i] for i in chosen]
        if not examples:
            raise InputError("the task", [f"the split '{split}' is empty"])
        evaluation[split] = examples
    return Splits(train, evaluation)


def encode(recipe: Recipe, splits: Splits, encoder: Encoder, vocabulary: int) -> Data:
    """Token ids of all splits.

    Args:
        vocabulary: Rows of the model's embedding table; no row of an image asks for it.

    Raises:
        InputError: Nothing left to train on, rows without tokens, ids outside the vocabulary.
    """
    task, objective = recipe.task, recipe.objective
    data = Data(train=[], train_examples=splits.train, evaluation={})
    rows = objective.rows(task, splits.train, encoder, "train")
    data.train = _keep_trainable(data, "train", rows)
    if not data.train:
        raise InputError(
            "the recipe",
            [
                Problem(
                    "loop.max_length",
                    f"within {recipe.loop.max_length} tokens not one of {len(rows)} training rows "
                    "keeps a label; the prompts alone are as long, so raise it",
                )
            ],
        )
    for split, examples in splits.evaluation.items():
        encoded = objective.rows(task, examples, encoder, "predict")
        if task.asks == "likelihood":
            encoded = _keep_trainable(data, split, encoded)
            if not encoded:
                raise InputError("the task", [f"no token of the split '{split}' can be scored"])
        else:
            data.reports.append(_report(split, encoded, 0))
        data.evaluation[split] = (examples, encoded)
    _stop_at_empty_rows(data)
    number(data.train)
    _remark(data, encoder)
    _stop_outside_vocabulary(data, vocabulary)
    return data


def _wanted_splits(recipe: Recipe) -> list[str]:
    task = recipe.task
    there = [s for s in task.splits() if s != "train"] + ([HELD_OUT] if task.hold_out else [])
    if task.evaluate is None:
        return [s for s in there if s != HELD_OUT]
    unknown = [s for s in task.evaluate if s not in there]
    if unknown:
        raise InputError(
            "the recipe",
            [
                Problem("task.evaluate", f"no split '{s}'; there are {', '.join(there)}")
                for s in unknown
            ],
        )
    return list(task.evaluate)


def _draw(recipe: Recipe, rows: list[Example]) -> tuple[list[Example], list[Example]]:
    """Training rows and held-out rows, drawn by the task's own seed."""
    task = recipe.task
    if not task.hold_out and task.train_examples is None:
        return rows, []
    asked = task.hold_out + (task.train_examples or 1)
    if asked > len(rows):
        raise InputError(
            "the recipe",
            [
                Problem(
                    "task",
                    f"train_examples and hold_out ask for {asked} rows, the training split has "
                    f"{len(rows)}",
                )
            ],
        )
    order = list(range(len(rows)))
    random.Random(f"draw-{task.data_seed}").shuffle(order)
    held_out = [rows[i] for i in sorted(order[: task.hold_out])]
    rest = order[task.hold_out :][: task.train_examples]
    return [rows[i] for i in sorted(rest)], held_out


def _keep_trainable(data: Data, split: str, rows: list[Row]) -> list[Row]:
    kept = [row for row in rows if any(label != IGNORED for label in row.labels)]
    data.reports.append(_report(split, kept, len(rows) - len(kept)))
    return kept


def number(rows: Sequence[Row]) -> None:
    """Tell training rows where they start."""
    start = 0
    for row in rows:
        row.start = start
        start += row.length


def _report(split: str, rows: Sequence[Row], dropped: int) -> DataReport:
    return DataReport(
        split=split,
        rows=len(rows),
        dropped=dropped,
        truncated=sum(row.truncated > 0 for row in rows),
        tokens=sum(row.length for row in rows),
        targets=sum(sum(label != IGNORED for label in row.labels) for row in rows),
        longest=max((row.length for row in rows), default=0),
    )


def _remark(data: Data, encoder: Encoder) -> None:
    for report in data.reports:
        all_rows = report.rows + report.dropped
        if report.dropped:
            data.remarks.append(
                f"{report.split}: {report.dropped} of {all_rows} rows keep no label within "
                f"{encoder.max_length} tokens and are left out"
            )
        if report.truncated:
            data.remarks.append(
                f"{report.split}: {report.truncated} of {all_rows} rows were cut to "
                f"{encoder.max_length} tokens"
            )
    if encoder.tokenizer.pad_token_id == encoder.tokenizer.eos_token_id:
        end = encoder.tokenizer.eos_token_id
        trained = sum(end in row.labels for row in data.train)
        data.remarks.append(
            "the pad token is the end token; padding is masked by position, and the end token is "
            f"a target in {trained} of {len(data.train)} training rows"
        )


def _stop_at_empty_rows(data: Data) -> None:
    parts = {"train": data.train} | {name: rows for name, (_, rows) in data.evaluation.items()}
    empty = [f"{name}: the row {r.id} has no tokens" for name, rows in parts.items() for r in rows
             if not r.length]  # fmt: skip
    if empty:
        more = len(empty) - 5
        raise InputError("the task", [*empty[:5], *([f"and {more} more"] if more > 0 else [])])


def _stop_outside_vocabulary(data: Data, vocabulary: int) -> None:
    evaluated = [row for _, rows in data.evaluation.values() for row in rows]
    ids = (row.inputs["input_ids"] for row in [*data.train, *evaluated] if row.image is None)
    highest = max((max(one) for one in ids), default=-1)
    if highest >= vocabulary:
        raise InputError(
            "the recipe",
            [
                Problem(
                    "model.checkpoint",
                    f"its tokenizer gives id {highest}, its embeddings have {vocabulary} rows; "
                    "tokenizer and weights do not belong together",
                )
            ],
        )


class Order:
    """Which rows each update trains on, as a pure function of seed and update.

    Rows run through one permutation after the other, and every update takes a full global batch
    from that stream, across the border of two passes where it falls inside a batch. The two updates
    with the longest rows are moved to the front: a run that will run out of memory does so in its
    first minute. Nothing here depends on the micro-batch or the number of processes.

    Args:
        lengths: Tokens of each row.
        global_batch: Rows of an update.
        updates: How many there will be.
        seed: Of the permutations.
    """

    def __init__(self, lengths: Sequence[int], global_batch: int, updates: int, seed: int) -> None:
        self._count = len(lengths)
        self._global_batch = global_batch
        self._seed = seed
        self._permutations: dict[int, list[int]] = {}
        self._update = list(range(updates))
        longest = [max(lengths[i] for i in self._stream(u)) for u in self._update]
        for place in range(min(2, updates)):
            best = max(range(place, updates), key=lambda u: (longest[self._update[u]], -u))
            self._update[place], self._update[best] = self._update[best], self._update[place]

    def rows(self, step: int) -> list[int]:
        """Row numbers of update `step`."""
        return self._stream(self._update[step])

    def _stream(self, update: int) -> list[int]:
        start = update * self._global_batch
        return [
            self._permutation(at // self._count)[at % self._count]
            for at in range(start, start + self._global_batch)
        ]

    def _permutation(self, epoch: int) -> list[int]:
        if epoch not in self._permutations:
            order = list(range(self._count))
            random.Random(f"order-{self._seed}-{epoch}").shuffle(order)
            self._permutations[epoch] = order
        return self._permutations[epoch]


def digest_of_rows(rows: Sequence[Row]) -> str:
    """Of what is read and asked for in each row, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        told = [row.id, *(list(values) for values in row.inputs.values()), list(row.labels)]
        digest.update(repr(told).encode())
        if row.image is not None:
            digest.update(row.image.pixels)
    return digest.hexdigest()


def updates_of(recipe: Recipe, rows: int) -> int:
    """How many optimizer updates the run makes."""
    loop = recipe.loop
    if loop.steps is not None:
        return loop.steps
    assert loop.epochs is not None
    return max(1, round(loop.epochs * rows / loop.global_batch_size))
