"""A run as data: one part from each family, a model, a loop, a budget."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lowres.core import registry
from lowres.core.errors import InputError, Problem
from lowres.core.method import Method
from lowres.core.parts import (
    Freezing,
    Lever,
    Objective,
    Optimizer,
    PositiveFloat,
    PositiveInt,
    Procedure,
    Share,
    Task,
    part,
    values,
)
from lowres.core.schedule import Schedule

SCHEMA = 1

# An unquoted `no`, as accelerate names it, is false in YAML.
_no = BeforeValidator(lambda value: "no" if value is False else value)


@part
class Model:
    """Which weights.

    Args:
        checkpoint: Hub id, folder, or `package:<module>/<path>` (weights inside an installed
            package).
        revision: Hub commit, tag or branch.
        dtype: What the weights are held in.
        attention: Attention implementation of transformers.
        pad_token: A token of the vocabulary to pad with, for tokenizers that name none.
        init: `random` builds the architecture with fresh weights (pretraining).
        dropout: In place of each share of dropout in the checkpoint's configuration.
        trust_remote_code: Run code that comes with the checkpoint. Off unless asked for here.
    """

    checkpoint: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    pad_token: str | None = None
    init: Literal["pretrained", "random"] = "pretrained"
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    trust_remote_code: bool = False


@part
class Loop:
    """How long and in which portions.

    Args:
        epochs: Passes over the training rows; give this or `steps`. Updates are
            `round(epochs * rows / global_batch_size)`, at least one, each over a full global batch.
        steps: Optimizer updates.
        micro_batch_size: Rows that are in memory at once: the memory knob.
        global_batch_size: Rows of an update, over all micro-batches and processes: the learning
            knob.
        max_length: Longest row in tokens.
        eval_batch_size: Rows at once in evaluation; the micro-batch when None.
        warmup_ratio: Share of the updates over which the learning rate rises from 0.
        max_grad_norm: Gradients are scaled down to this norm; None leaves them.
        precision: Autocast, as accelerate names it.
        seed: Of weights made anew, data order and dropout.
        eval_every: Evaluate after so many updates; None only at the end.
        save_every: Write a checkpoint after so many updates; None only when interrupted.
        keep_checkpoints: Older checkpoints beyond so many are deleted.
        trackers: Further places to log to.
    """

    epochs: PositiveFloat | None = None
    steps: PositiveInt | None = None
    micro_batch_size: PositiveInt
    global_batch_size: PositiveInt
    max_length: Annotated[int, Field(ge=2)]
    eval_batch_size: PositiveInt | None = None
    warmup_ratio: Share = 0.0
    schedule: Schedule = "linear"
    max_grad_norm: PositiveFloat | None = 1.0
    precision: Annotated[Literal["no", "bf16", "fp16"], _no] = "no"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    eval_every: PositiveInt | None = None
    save_every: PositiveInt | None = None
    keep_checkpoints: PositiveInt = 2
    trackers: tuple[Literal["tensorboard"], ...] = ()

    @property
    def accumulation(self) -> int:
        """Micro-batches of an update on one process; derived, never set."""
        return -(-self.global_batch_size // self.micro_batch_size)

    def problems(self) -> Iterator[Problem]:
        if (self.epochs is None) == (self.steps is None):
            yield Problem("loop", "give exactly one of `epochs` and `steps`")
        if self.global_batch_size % self.micro_batch_size:
            yield Problem(
                "loop.micro_batch_size",
                f"{self.micro_batch_size} does not divide global_batch_size "
                f"{self.global_batch_size}; choose a divisor",
            )
        if "tensorboard" in self.trackers:
            from importlib.util import find_spec

            if find_spec("tensorboard") is None:
                yield Problem(
                    "loop.trackers",
                    "'tensorboard' is not installed; pip install 'lowres[tensorboard]'",
                )


@part
class Budget:
    """What the run may take. Enforced while it runs.

    Args:
        device_gib: Device memory; on CUDA the allocator is capped at it.
        host_gib: Resident memory of the process.
        disk_gib: Size of the output folder.
        minutes: Wall-clock time from start to the last update.
    """

    device_gib: PositiveFloat | None = None
    host_gib: PositiveFloat | None = None
    disk_gib: PositiveFloat | None = None
    minutes: PositiveFloat | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, complete and valid. Made by `load_recipe`, never by hand from unchecked values."""

    model: Model
    task: Task
    method: Method
    objective: Objective
    optimizer: Optimizer
    loop: Loop
    freezing: Freezing
    procedure: Procedure
    levers: tuple[Lever, ...] = ()
    budget: Budget = Budget()
    schema: int = SCHEMA
    source: str | None = None
    overrides: tuple[str, ...] = ()
    lines: Mapping[str, int] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """Dotted key to line in `source`."""

    def located(self, error: InputError) -> InputError:
        """The error with the recipe's file and the lines of the keys it names."""
        subject = self.source if self.source and error.subject == "the recipe" else error.subject
        found = [
            dataclasses.replace(p, line=p.line or line_of(self.lines, p.where))
            for p in error.problems
        ]
        return InputError(subject, found)

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults included; reading it again gives the same recipe."""
        out: dict[str, Any] = {"schema": self.schema, "model": values(self.model)}
        for family in registry.FAMILIES:
            if family == "lever":
                out["levers"] = [{"name": lever.name, **values(lever)} for lever in self.levers]
            else:
                one = getattr(self, family)
                out[family] = {"name": one.name, **values(one)}
        return out | {"loop": values(self.loop), "budget": values(self.budget)}

    @property
    def digest(self) -> str:
        """16 hex digits over what the run computes; two recipes of equal digest are the same run.

        The budget, trackers, checkpoint and evaluation intervals are left out: changing them
        changes no weight. So is the micro-batch, which changes them by rounding, and otherwise only
        where a pass draws numbers: a run that was short of memory must go on with a smaller one.
        """
        resolved = self.resolved()
        del resolved["budget"]
        for key in (
            "eval_every",
            "save_every",
            "keep_checkpoints",
            "trackers",
            "eval_batch_size",
            "micro_batch_size",
        ):
            del resolved["loop"][key]
        for key in ("evaluate", "eval_examples"):
            del resolved["task"][key]
        text = json.dumps(resolved, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


SECTIONS: dict[str, type[Any]] = {"model": Model, "loop": Loop, "budget": Budget}
OPTIONAL: dict[str, Any] = {
    "freezing": "none",
    "procedure": "finetune",
    "levers": [],
    "budget": {},
    "schema": SCHEMA,
}
KEYS = ("schema", "model", "task", "method", "freezing", "objective", "optimizer", "levers",
        "procedure", "loop", "budget")  # fmt: skip


def line_of(lines: Mapping[str, int], where: str) -> int | None:
    """The line of a dotted key, or of the nearest key above it that stands in the file."""
    while where:
        if where in lines:
            return lines[where]
        where = where.rpartition(".")[0]
    return None
