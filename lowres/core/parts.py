"""The base of every family. A part is a frozen dataclass whose fields are its recipe keys.

A part's constructor stores and validates; it loads, seeds and prints nothing. No part knows
another: what one needs of the others it finds in the nouns of `core`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    cast,
    dataclass_transform,
)

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from lowres.core.example import Asks, Batch, Example, Prediction, Purpose, Row
from lowres.core.metrics import Metric

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.batching import Batching
    from lowres.core.blocks import Blocks
    from lowres.core.engine import Accelerator, Engine
    from lowres.core.learner import Encoder, Head, Kind, Learner, LoadRequest
    from lowres.core.recipe import Recipe
    from lowres.core.sample import Sample
    from lowres.core.session import Session

T = TypeVar("T")

Guard = Literal["gradients", "moved", "frozen", "saved"]
"""Checks of a run while it goes on; `run/guards.py` says what each is."""

Circumstance = Literal[
    "quantised", "nf4", "int8", "in_backward", "without_gradients", "rotating", "updated_apart",
    "divided", "packed", "chunked", "tiled", "recomputed", "frozen_input",
]  # fmt: skip
"""What a part brings that another may not work with: weights in 4 or 8 bits, and which of the two;
updates within the backward pass; updates without one; freezing that takes turns; gradients taken
away as they come, and copies updated that overwrite what is trained; weights spread over processes;
several rows in one; logits made slice by slice; feed-forward parts run on slices of tokens; blocks
run once more in backward; nothing trained at the input."""

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def part(cls: type[T]) -> type[T]:
    """Make a class a part or a section of a recipe: frozen, keyword-only, unknown keys refused."""
    make = pydantic_dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
    return cast("type[T]", make(cls))


@part
class Part:
    """What every family shares."""

    family: ClassVar[str]
    sample_fields: ClassVar[Mapping[str, Any]] = {}
    """Values for fields without a default, and for those whose default is too large for the models
    of the tests. For tests and the compatibility table, which run on such models: what else is told
    or measured of a part is told of its defaults."""
    waives: ClassVar[frozenset[Guard]] = frozenset()
    """Guards that do not hold by what the part is: `gradients` of one that makes none."""

    brings: ClassVar[frozenset[Circumstance]] = frozenset()

    def brought(self) -> frozenset[Circumstance]:
        """`brings`; a part may tell it of its fields."""
        return self.brings

    @property
    def name(self) -> str:
        """The file's name is the part's name."""
        return type(self).__module__.rpartition(".")[2]

    def check(self, recipe: Recipe) -> Iterator[str]:
        """What in the recipe it cannot work with: the value, the reason, the nearest choice."""
        return iter(())

    def alone(self) -> str:
        """Why one process only can do it, with what to do instead; nothing where several can."""
        return ""


@part
class Task(Part):
    """Which data, which prompt, which metric.

    Subclasses give `examples`, `score` and the class attributes; the fields below are every task's.

    Args:
        train_examples: Rows drawn from the training split; None for all.
        data_seed: Seed of that draw and of `hold_out`, apart from the seed of the run.
        hold_out: Rows taken out of the training split and offered as the split `held_out`, for
            choosing hyperparameters without looking at an evaluation split.
        evaluate: Splits to score at the end; None for all but `train` and `held_out`.
        eval_examples: Score at most so many rows of each split; None for all.
    """

    family: ClassVar[str] = "task"
    version: ClassVar[int]
    asks: ClassVar[Asks]
    labels: ClassVar[tuple[str, ...]] = ()
    metric: ClassVar[str]
    lower_is_better: ClassVar[frozenset[str]] = frozenset()
    """Metrics whose lower values are better."""
    pattern: ClassVar[str] = "{text}"
    label_words: ClassVar[tuple[str, ...]] = ()
    published_overlap: ClassVar[int] = 0
    """Evaluation rows that also stand in the training split, in the data as published."""

    train_examples: PositiveInt | None = None
    data_seed: int = 0
    hold_out: NonNegativeInt = 0
    evaluate: tuple[str, ...] | None = None
    eval_examples: PositiveInt | None = None

    def splits(self) -> tuple[str, ...]:
        """Names of the splits, `train` first."""
        raise NotImplementedError

    def examples(self, split: str) -> Sequence[Example]:
        """The rows of a split. Raises InputError naming each broken row."""
        raise NotImplementedError

    def score(
        self, examples: Sequence[Example], predictions: Sequence[Prediction]
    ) -> Mapping[str, Metric]:
        """Metrics by name; `self.metric` is among them."""
        raise NotImplementedError

    def baseline(self, train: Sequence[Example], examples: Sequence[Example]) -> Prediction | None:
        """The majority of the training split as a prediction; None where there is none."""
        return None


@part
class Freezing(Part):
    """Where: which blocks stay frozen."""

    family: ClassVar[str] = "freezing"

    def blocks(self, learner: Learner, sample: Sample) -> Blocks:
        """The learner's map with a choice made; `sample` is for strategies that look at data."""
        raise NotImplementedError


@part
class Objective(Part):
    """What is minimised, and how its answer is read off the model."""

    family: ClassVar[str] = "objective"
    heads: ClassVar[Mapping[Kind, Head]]
    serves: ClassVar[frozenset[Asks]]
    by_token: ClassVar[bool] = False
    """Whether the loss of a causal head is a sum over target tokens, taken through
    `Learner.token_logprobs`, that does not ask in which row of the batch a token lies."""

    def rows(
        self, task: Task, examples: Sequence[Example], encoder: Encoder, purpose: Purpose
    ) -> list[Row]:
        """Token ids of each example, within `encoder.max_length`.

        A row whose every label is IGNORED is returned as it is: the caller counts and drops it.
        """
        raise NotImplementedError

    def targets(self, batch: Batch) -> int:
        """How many terms the loss sums over; the mean is taken over the global batch."""
        raise NotImplementedError

    def loss(self, learner: Learner, batch: Batch) -> torch.Tensor:
        """Sum (not mean) of the loss over the batch's targets, a scalar in float32."""
        raise NotImplementedError

    def predict(self, learner: Learner, batch: Batch, task: Task) -> list[Prediction]:
        """One prediction a row."""
        raise NotImplementedError

    def longest(self, task: Task, max_length: int, kind: Kind) -> int:
        """Tokens of the longest sequence that training or evaluation makes."""
        return max_length

    def padding_side(self, purpose: Purpose, task: Task, kind: Kind) -> Literal["left", "right"]:
        """`left` where `predict` reads the next token off the last column."""
        return "right"


@part
class Optimizer(Part):
    """The update rule and its states."""

    family: ClassVar[str] = "optimizer"
    searched: ClassVar[bool] = False
    """Whether `lowres fit` weighs it."""
    refuses: ClassVar[Mapping[Literal["in_backward", "on_host", "divided"], str]] = {}
    """Why its update cannot be made for each parameter by itself in the backward pass, or not in
    host memory, nor on flat parts of them; with what to do instead; nothing where it can."""

    def make(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """The optimizer over the trained parameters, given with their names."""
        raise NotImplementedError

    def engine(
        self, accelerator: Accelerator, learner: Learner, optimizer: torch.optim.Optimizer
    ) -> Engine:
        """How updates are made; back-propagation through accelerate unless the rule has its own."""
        from lowres.core.engine import BackPropagation

        return BackPropagation(accelerator, learner, optimizer)


@part
class Lever(Part):
    """How bytes are saved, nothing else changed."""

    family: ClassVar[str] = "lever"
    effect: ClassVar[Literal["exact", "lossy"]]
    searched: ClassVar[int | None] = None
    """When `lowres fit` reaches for it: 0 always; 1, 2, ... while nothing fits with what came
    before; None never, because it saves nothing that a search could weigh."""
    tolerance: ClassVar[float] = 0.0
    """Of a lossy lever: largest distance of a matrix as it is held from that of the checkpoint,
    relative to this (Frobenius). Losses and gradients are then those of the matrices as held."""
    sample_recipe: ClassVar[Mapping[str, Any]] = {}
    """Sections of a recipe, or some of the loop's values, that it needs, for the contract tests."""
    forms: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Fields with which it goes together with other parts than by default, by what the
    compatibility table calls it then."""
    whole_process: ClassVar[bool] = False
    """Whether it changes the process for good, so that the next run wants another one."""

    def form(self) -> str:
        """Which of `forms` it has, or its name."""
        return self.name

    def on_accelerator(self, options: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of `accelerate.Accelerator`, before anything else is made."""
        return options

    def uneven(self) -> str | None:
        """Why blocks built alike do not work alike under it, so that a plan traces all of them."""
        return None

    def on_load(self, request: LoadRequest) -> LoadRequest:
        return request

    def on_learner(self, learner: Learner) -> Learner:
        return learner

    def on_rows(self, recipe: Recipe, learner: Learner, rows: Sequence[Row]) -> None:
        """Told the training rows, in the data set's order, after `on_learner` of all levers."""

    def on_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        return optimizer

    def on_engine(self, engine: Engine) -> Engine:
        return engine

    def on_batching(self, batching: Batching) -> Batching:
        return batching


@part
class Procedure(Part):
    """How training is organised around steps."""

    family: ClassVar[str] = "procedure"

    def run(self, session: Session) -> Learner:
        raise NotImplementedError


def fold(start: T, parts: Iterable[Part], hook: str) -> T:
    """Pass a value through the same hook of several parts, first to last."""
    return functools.reduce(lambda value, p: getattr(p, hook)(value), parts, start)


def values(part_: Any) -> dict[str, Any]:
    """A part's or section's fields, JSON-ready."""
    from pydantic import TypeAdapter

    dumped: dict[str, Any] = TypeAdapter(type(part_)).dump_python(part_, mode="json")
    return dumped
