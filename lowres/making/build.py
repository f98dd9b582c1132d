"""From a recipe to a prepared model, tokenizer, collator and optimizer, for anyone's loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowres.core.batching import batching_of
from lowres.core.errors import InputError, Problem
from lowres.core.example import Batch, Row, collate
from lowres.core.learner import Encoder, Head, Kind, Learner, LoadRequest
from lowres.core.parts import fold
from lowres.core.recipe import Recipe
from lowres.core.rotation import Rotation
from lowres.core.sample import Sample
from lowres.core.scored import Scored
from lowres.making import choices
from lowres.making import data as data_module

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.blocks import Blocks
    from lowres.core.engine import Engine
    from lowres.making.data import Data


@dataclass
class Inputs:
    """What is known before any weight is read."""

    config: Any
    kind: Kind
    head: Head
    tokenizer: Any
    encoder: Encoder
    data: Data


@dataclass
class Built:
    """A recipe made ready for anyone's loop.

    Args:
        model: On the CPU, adapters in place, frozen and trained parameters marked.
        tokenizer: The checkpoint's.
        collator: Rows to a padded batch; `model(**collator(rows))` has a loss for the heads of
            transformers.
        optimizer: Over the trained parameters.
        train_rows: What the recipe trains on, in the data set's order.
        learner: The model as objectives ask it.
        inputs: Configuration and data.
        loaded: Types of the weights when they were loaded, by name; see `weights.types_of`.
        rotation: To be told of every update: `rotation.turn(optimizer, step)` before its gradients.
    """

    model: nn.Module
    tokenizer: Any
    collator: Callable[[Sequence[Row]], Batch]
    optimizer: torch.optim.Optimizer
    train_rows: Sequence[Row]
    learner: Learner
    inputs: Inputs
    loaded: dict[str, torch.dtype]
    rotation: Rotation


def read(recipe: Recipe, splits: data_module.Splits | None = None) -> Inputs:
    """Configuration, tokenizer and encoded data: all that can go wrong before weights are loaded.

    Args:
        splits: The examples, where they were read already.

    Raises:
        InputError: With every problem of checkpoint and data, and how to mend each.
    """
    from lowres.bridges.kinds import vocabulary_of

    (config, kind, tokenizer), splits = _all(
        lambda: _read_model(recipe), lambda: splits or data_module.read(recipe)
    )
    encoder = Encoder(tokenizer, kind, recipe.loop.max_length)
    data = data_module.encode(recipe, splits, encoder, vocabulary_of(config))
    return Inputs(config, kind, recipe.objective.heads[kind], tokenizer, encoder, data)


def _all(*steps: Callable[[], Any]) -> list[Any]:
    """The results of independent steps; one InputError with the problems of all that fail."""
    results, failed = [], []
    for step in steps:
        try:
            results.append(step())
        except InputError as error:
            failed.append(error)
    if failed:
        subject = failed[0].subject if len(failed) == 1 else "the recipe"
        raise InputError(subject, [problem for error in failed for problem in error.problems])
    return results


def _read_model(recipe: Recipe) -> tuple[Any, Kind, Any]:
    from lowres.bridges import blocks, kinds, transformers

    wanted = recipe.model
    source = (wanted.checkpoint, wanted.revision, wanted.trust_remote_code)
    config = transformers.load_config(*source)
    blocks.set_dropout(config, wanted.dropout)
    kind = kinds.kind_of(config)
    tokenizer, _ = _all(
        lambda: (
            kinds.image_reader(config)
            if kind == "vision"
            else transformers.load_tokenizer(*source, wanted.pad_token)
        ),
        lambda: stop_at_wrong_kind(recipe, kind),
    )
    stop_at_position_limit(recipe, config, tokenizer, kind)
    return config, kind, tokenizer


def stop_at_wrong_kind(recipe: Recipe, kind: Kind) -> None:
    """Raise InputError when the objective does not work on this kind of model."""
    if kind not in recipe.objective.heads:
        serves = ", ".join(recipe.objective.heads)
        raise InputError(
            "the recipe",
            [
                Problem(
                    "objective",
                    f"'{recipe.objective.name}' works on {serves}; '{recipe.model.checkpoint}' is "
                    f"a(n) {kind}",
                )
            ],
        )


def stop_at_position_limit(recipe: Recipe, config: Any, tokenizer: Any, kind: Kind) -> None:
    """Raise InputError when rows may be longer than the model's positions."""
    longest = recipe.objective.longest(recipe.task, recipe.loop.max_length, kind)
    tokens = {"generated tokens": longest - recipe.loop.max_length}
    vectors = {f"vectors of '{recipe.method.name}'": recipe.method.positions()}
    # Vectors do not come from the tokenizer.
    for limit, more in (
        (tokenizer.model_max_length, tokens),
        (getattr(config, "max_position_embeddings", None), tokens | vectors),
    ):
        longest = recipe.loop.max_length + sum(more.values())
        if not isinstance(limit, int) or not 0 < limit < longest:
            continue
        named = " and ".join(f"{count} {what}" for what, count in more.items() if count)
        tail = f" (with {named}: {longest})" if named else ""
        text = f"{recipe.loop.max_length}{tail} is more than the {limit} positions of the model"
        raise InputError("the recipe", [Problem("loop.max_length", text)])


def request_of(recipe: Recipe, inputs: Inputs) -> LoadRequest:
    """What to load, before levers change it."""
    return LoadRequest(
        checkpoint=recipe.model.checkpoint,
        revision=recipe.model.revision,
        head=inputs.head,
        labels=len(recipe.task.labels),
        dtype=recipe.model.dtype,
        attention=recipe.model.attention,
        init=recipe.model.init,
        trust_remote_code=recipe.model.trust_remote_code,
    )


def assemble(
    recipe: Recipe,
    inputs: Inputs,
    load: Callable[..., tuple[nn.Module, list[str]]] | None = None,
    chosen: Callable[[Learner], None] | None = None,
    adapted: Callable[[Learner], None] | None = None,
    choose: Callable[[Learner], Blocks] | None = None,
    apply: Callable[[Learner], nn.Module] | None = None,
) -> Built:
    """Load the weights and fold in freezing, method, levers and optimizer, in that order.

    Args:
        load: Takes the place of `transformers.load_model` (the planner loads shapes).
        chosen, adapted: Called after the freezing has chosen and after the method was applied.
        choose, apply: Take the place of `choice_of` and of `choices.apply`.
    """
    import torch

    from lowres.bridges import transformers
    from lowres.making import weights

    request = fold(request_of(recipe, inputs), recipe.levers, "on_load")
    seed = recipe.loop.seed
    loads = load or transformers.load_model
    model, fresh = loads(request, inputs.config, inputs.encoder.pad_id, seed)
    blocks = blocks_of(recipe, inputs, model, fresh)
    if load is None:
        weights.stop_at_wide(model, request, blocks, fresh)
    loaded = weights.types_of(model)
    learner = Learner(model, model, inputs.tokenizer, inputs.kind, inputs.head, blocks)

    learner.blocks = choose(learner) if choose else choice_of(recipe, inputs, learner)
    rotation = Rotation(recipe.freezing, model, blocks.names)
    if chosen is not None:
        chosen(learner)
    torch.manual_seed(seed)
    applied = apply(learner) if apply else choices.apply(recipe, learner, sample_of(recipe, inputs))
    learner.module = learner.base = applied
    if adapted is not None:
        adapted(learner)
    learner = fold(learner, recipe.levers, "on_learner")
    for lever in recipe.levers:
        lever.on_rows(recipe, learner, inputs.data.train)

    trained = [(n, p) for n, p in learner.base.named_parameters() if p.requires_grad]
    if not trained:
        raise InputError(
            "the recipe",
            [
                f"method '{recipe.method.name}' and freezing '{recipe.freezing.name}' "
                "leave nothing to train"
            ],
        )
    optimizer = fold(recipe.optimizer.make(trained), recipe.levers, "on_optimizer")
    return Built(
        model=learner.base,
        tokenizer=inputs.tokenizer,
        collator=collator(recipe, inputs),
        optimizer=optimizer,
        train_rows=inputs.data.train,
        learner=learner,
        inputs=inputs,
        loaded=loaded,
        rotation=rotation,
    )


def blocks_of(recipe: Recipe, inputs: Inputs, model: nn.Module, fresh: Sequence[str]) -> Blocks:
    """The map of a loaded model; of weights that are random on purpose none was missing."""
    from lowres.bridges.blocks import map_blocks

    lacking = fresh if recipe.model.init == "pretrained" else ()
    return map_blocks(model, lacking, may_have_new_head=inputs.head == "classification")


def choice_of(recipe: Recipe, inputs: Inputs, learner: Learner) -> Blocks:
    """Which blocks train; the main process decides for all."""
    from lowres.bridges.accelerate import agreed

    found = recipe.freezing.blocks(learner, sample_of(recipe, inputs))
    if isinstance(recipe.freezing, Scored):
        found = dataclasses.replace(found, trained=frozenset(agreed(sorted(found.trained))))
    return found


def keep(chosen: Sequence[str] | None) -> Callable[[Learner], Blocks] | None:
    """Takes the place of `choice_of` where the choice was made before; None where it was not."""
    return None if chosen is None else lambda learner: Scored.keep(learner.blocks, chosen)


def sample_of(recipe: Recipe, inputs: Inputs, largest_only: bool = False) -> Sample:
    """The training rows for a part that looks at data."""
    side = recipe.objective.padding_side("train", recipe.task, inputs.kind)

    def make(rows: Sequence[Row]) -> Batch:
        # Padded: the levers that lay rows out otherwise have not prepared the model yet.
        return collate(rows, inputs.encoder.pad_id, side)

    return Sample(inputs.data.train, make, recipe.objective, recipe.loop.micro_batch_size,
                  largest_only)  # fmt: skip


def engine_of(
    recipe: Recipe, accelerator: Any, learner: Learner, optimizer: torch.optim.Optimizer
) -> Engine:
    """How updates are made: the optimizer's engine with what the levers change in it."""
    engine = recipe.optimizer.engine(accelerator, learner, optimizer)
    return fold(engine, recipe.levers, "on_engine")


def build(recipe: Recipe) -> Built:
    """Prepare everything a training loop needs, as `lowres run` would.

    Raises:
        InputError: For what is wrong with the recipe, its data or its checkpoint.
    """
    try:
        return assemble(recipe, read(recipe))
    except InputError as error:
        raise recipe.located(error) from error


def collator(recipe: Recipe, inputs: Inputs) -> Callable[[Sequence[Row]], Batch]:
    """The function that makes a batch of training rows."""
    side = recipe.objective.padding_side("train", recipe.task, inputs.kind)
    batching = batching_of(recipe)
    return lambda rows: batching.collate(rows, inputs.encoder.pad_id, side)
