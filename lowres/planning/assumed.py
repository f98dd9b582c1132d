"""Inputs of a plan where the tokenizer or the data is not at hand: rows as long as allowed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lowres.bridges import blocks, tokenizers, transformers
from lowres.bridges.kinds import image_reader, kind_of, vocabulary_of
from lowres.core.errors import InputError
from lowres.core.example import Example, Row
from lowres.core.images import Image
from lowres.core.learner import Encoder
from lowres.core.recipe import Recipe
from lowres.making import build, data
from lowres.making.build import Inputs


def inputs_for(recipe: Recipe) -> tuple[Inputs, str]:
    """What the rehearsal needs, from the data where they can be read.

    Returns:
        The inputs, and in a few words where the shapes come from.

    Raises:
        InputError: No configuration, a wrong kind of model, rows longer than its positions.
    """
    wanted = recipe.model
    config = config_of(wanted.checkpoint, wanted.revision, wanted.trust_remote_code)
    kind = kind_of(config)
    build.stop_at_wrong_kind(recipe, kind)
    config_only = kind != "vision" and not tokenizers.has_tokenizer(wanted.checkpoint)
    if not config_only:
        try:
            splits = data.read(recipe)
        except InputError as error:
            reason = f"the data cannot be read here: {error.problems[0]}"
        else:
            inputs = build.read(recipe, splits)
            longest = max(row.length for row in inputs.data.train)
            return inputs, f"the data: {len(inputs.data.train)} rows, the longest {longest} tokens"
    else:
        reason = f"'{wanted.checkpoint}' has no tokenizer"
    told = f"assumed: rows of {recipe.loop.max_length} tokens ({reason})"
    return assumed_inputs(recipe, config), told


def assumed_inputs(recipe: Recipe, config: Any = None, *, padded: bool = True) -> Inputs:
    """Inputs of a recipe without its tokenizer and data.

    Args:
        config: Of the model, where it was read already.
        padded: Where several rows go together, one is a token shorter: those of data differ in
            length, so that attention needs a mask.
    """
    if config is None:
        wanted = recipe.model
        config = config_of(wanted.checkpoint, wanted.revision, wanted.trust_remote_code)
    blocks.set_dropout(config, recipe.model.dropout)
    kind = kind_of(config)
    tokenizer = image_reader(config) if kind == "vision" else _stand_in(recipe, config)
    build.stop_at_position_limit(recipe, config, tokenizer, kind)
    encoder = Encoder(tokenizer, kind, recipe.loop.max_length)
    head = recipe.objective.heads[kind]
    return Inputs(config, kind, head, tokenizer, encoder, _rows(recipe, encoder, padded))


def _stand_in(recipe: Recipe, config: Any) -> Any:
    """A tokenizer that knows the words of the recipe."""
    words = tuple(getattr(recipe.objective, "words", None) or recipe.task.label_words)
    limit = getattr(config, "max_position_embeddings", None) or 1 << 20
    typed = getattr(config, "type_vocab_size", 0) > 0
    return tokenizers.stand_in_tokenizer(vocabulary_of(config), words, limit, typed)


def config_of(checkpoint: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model's configuration.

    Raises:
        InputError: When there is none; of a model id it says how to plan without the hub.
    """
    try:
        return transformers.load_config(checkpoint, revision, trust_remote_code)
    except InputError as error:
        if not transformers.resolve(checkpoint).is_hub:
            raise
        hint = "to plan without the hub, save its config.json in a folder and give the folder"
        problems = [dataclasses.replace(p, text=f"{p.text}; {hint}") for p in error.problems]
        raise InputError(error.subject, problems) from error


def _rows(recipe: Recipe, encoder: Encoder, padded: bool) -> data.Data:
    """As many rows as an update and an evaluation batch take, cut to the allowed length."""
    loop, task = recipe.loop, recipe.task
    example = _example(recipe, encoder)
    size = loop.eval_batch_size or loop.micro_batch_size
    train = recipe.objective.rows(task, [example], encoder, "train")[:1]
    data.number(train)
    scored = recipe.objective.rows(task, [example], encoder, "predict")[:1]
    train, scored = train * loop.global_batch_size, scored * size
    if padded and loop.micro_batch_size > 1:
        # In each micro-batch of the second update, the first with states.
        updates = data.updates_of(recipe, len(train))
        order = data.Order([1] * len(train), len(train), updates, loop.seed)
        rows = order.rows(min(1, updates - 1))
        for place in rows[loop.micro_batch_size - 1 :: loop.micro_batch_size]:
            train[place] = _shorter(train[place])
    if padded and size > 1:
        scored[-1] = _shorter(scored[-1])
    return data.Data(
        train=train,
        train_examples=[example],
        evaluation={"assumed": ([example] * size, scored)},
    )


def _shorter(row: Row) -> Row:
    """By its first token; an image has no fewer."""
    if row.length == 1 or row.image is not None:
        return row
    alike = len(row.labels) == row.length
    inputs = {name: values[1:] for name, values in row.inputs.items()}
    return dataclasses.replace(row, inputs=inputs, labels=row.labels[1:] if alike else row.labels)


def _example(recipe: Recipe, encoder: Encoder) -> Example:
    words: Any = lambda n: " ".join(["word"] * n)
    length = recipe.loop.max_length
    if encoder.kind == "vision":
        shape = encoder.tokenizer.shape
        return Example("assumed", "", label=0, image=Image(bytes(math.prod(shape)), shape))
    if recipe.task.asks == "label":
        return Example("assumed", words(2 * length), label=0)
    if recipe.task.asks == "answer":
        # Evaluation sees the prompt alone: it is as long as allowed there, and in training the
        # answer's one word is what the prompt leaves room for.
        return Example("assumed", words(length - 3), answer=words(length))
    return Example("assumed", words(2 * length))
