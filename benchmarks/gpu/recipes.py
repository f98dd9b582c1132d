"""The recipes of the planner's GPU suite: shapes of 0.1 to 8 B, under the budgets of small cards.

Only shapes matter to memory and time, so weights are random. A recipe names its model by the folder
of its configuration; `located` puts the real folder there.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowres.core.reading import load_recipe
from lowres.core.recipe import Recipe

Side = Literal["below", "above"]

STEPS = 8
"""The first update, one with optimizer states, one to warm up, five that are timed."""
CAPS = (8, 12, 16, 24)
STRIDE = 16
"""Tokens between the two recipes of a boundary."""
SHORTEST = 64


@dataclass(frozen=True)
class Case:
    """One recipe of the suite.

    Args:
        raw: Keys of the recipe, its model by name.
        side: Of a boundary, where `loop.max_length` is a placeholder until the planner has said
            which length is the longest that fits.
        longest: The longest row that the model takes, the end of that search.
        stored: The weights must lie in a file: what quantises on loading refuses fresh ones.
        traced: The events of the allocator are recorded, too.
        card: Of the catalogue, or the GiB of one of no name: planned for, and the allocator is held
            to what it would offer, instead of what the budget leaves of this machine's.
        varied: Rows are of four lengths, up to the longest, and of random tokens.
    """

    name: str
    model: str
    raw: Mapping[str, Any]
    longest: int
    side: Side | None = None
    stored: bool = False
    traced: bool = False
    card: str | float | None = None
    varied: bool = False

    @property
    def boundary(self) -> str:
        """What the two recipes of a boundary share."""
        return self.name.removesuffix(f"-{self.side}")

    def recipe(self, max_length: int | None = None) -> Recipe:
        """The recipe as it is recorded: it names no place of this machine."""
        length = [] if max_length is None else [f"loop.max_length={max_length}"]
        return dataclasses.replace(load_recipe(dict(self.raw), length), overrides=())


def located(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the folder that its model lies in."""
    return dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, checkpoint=str(folder))
    )


@dataclass(frozen=True)
class Shape:
    """What decides which recipes make sense for a model.

    Args:
        billions: Of parameters.
        blocks: How many.
        longest: Row in tokens; 4,096 at most.
        biases: Whether BitFit has something to train.
    """

    kind: Literal["decoder", "encoder", "encoder_decoder"]
    billions: float
    blocks: int
    longest: int = 4096
    biases: bool = False
    attention: str = "sdpa"


SHAPES: dict[str, Shape] = {
    "SmolLM2-135M": Shape("decoder", 0.135, 30),
    "SmolLM2-360M": Shape("decoder", 0.362, 32),
    "gpt2-medium": Shape("decoder", 0.355, 24, longest=1024, biases=True),
    "Qwen3-0.6B": Shape("decoder", 0.596, 28),
    "Llama-3.2-1B": Shape("decoder", 1.236, 16),
    "opt-1.3b": Shape("decoder", 1.316, 24, longest=2048, biases=True),
    "Qwen2.5-1.5B": Shape("decoder", 1.544, 28, biases=True),
    "gemma-2-2b": Shape("decoder", 2.614, 26, attention="eager"),
    "Llama-3.2-3B": Shape("decoder", 3.213, 28),
    "Llama-3.1-8B": Shape("decoder", 8.030, 32),
    "bert-base-uncased": Shape("encoder", 0.109, 12, longest=512, biases=True),
    "roberta-large": Shape("encoder", 0.355, 24, longest=512, biases=True),
    "t5-base": Shape("encoder_decoder", 0.223, 24, longest=2048),
}

CHECKPOINTING = "gradient_checkpointing"
LORA: dict[str, Any] = {"name": "lora"}
WIDE: dict[str, Any] = {
    "name": "lora", "rank": 16, "alpha": 32, "targets": "all-linear", "dropout": 0.05,
}  # fmt: skip
FULL: dict[str, Any] = {"name": "full"}


def _settings(shape: Shape) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Names, bytes a parameter by rule of thumb, and what differs from the plainest recipe."""
    size, some = shape.billions, [CHECKPOINTING]
    yield "lora", 2, {"rows": 2, "length": 512}
    yield "lora-checkpointing", 2, {"rows": 4, "length": 1024, "levers": some}
    yield "lora-wide", 2, {"method": WIDE, "rows": 1, "length": 512, "foreach": True}
    yield "lora-long", 2, {"rows": 1, "length": 4096, "levers": some}
    yield "lora-rows8", 2, {"rows": 8, "length": 256, "accumulation": 2, "levers": some}
    if size < 4:
        yield "lora-float32", 4, {"length": 512, "wide": True, "levers": some}
    if shape.attention == "sdpa":
        yield "lora-eager", 2, {"length": 512, "attention": "eager"}
    yield "lora-generates", 2, {"length": 256, "answers": True}
    if size < 2.7:
        yield "full", 8, {"method": FULL, "length": 256}
    if size < 4:
        yield "full-8bit", 6, {"method": FULL, "length": 512, "optimizer": "adamw_8bit",
                               "levers": some}  # fmt: skip
    if size < 1.6:
        yield "full-float32", 16, {"method": FULL, "rows": 2, "length": 512, "wide": True}
        yield "full-foreach", 10, {"method": FULL, "rows": 4, "length": 512, "foreach": True,
                                   "levers": some}  # fmt: skip
    frozen = shape.blocks - 2 if size > 3 else shape.blocks // 2
    yield "full-prefix", 5, {"method": FULL, "length": 512, "optimizer": "adamw_8bit",
                             "freezing": {"name": "prefix", "frozen": frozen}}  # fmt: skip
    yield "lora-prefix", 2, {"rows": 4, "length": 512, "accumulation": 2,
                             "freezing": {"name": "prefix", "frozen": frozen}}  # fmt: skip
    if shape.biases:
        yield "bitfit", 2, {"method": {"name": "bitfit"}, "rows": 4, "length": 512}
        yield "bitfit-checkpointing", 2, {
            "method": {"name": "bitfit"}, "rows": 8, "length": 1024, "levers": some,
        }  # fmt: skip


BOUNDARIES: dict[str, tuple[tuple[str, int, dict[str, Any]], ...]] = {
    "SmolLM2-135M": (("lora", 8, {"rows": 8}), ("full", 12, {"method": FULL, "rows": 8})),
    "SmolLM2-360M": (
        ("lora", 8, {"rows": 4}),
        ("full-float32", 16, {"method": FULL, "rows": 4, "wide": True}),
    ),
    "gpt2-medium": (("full", 12, {"method": FULL, "rows": 8}), ("lora", 8, {"rows": 8})),
    "Qwen3-0.6B": (
        ("lora-checkpointing", 12, {"rows": 4, "levers": [CHECKPOINTING]}),
        ("full-8bit", 8, {"method": FULL, "rows": 2, "optimizer": "adamw_8bit"}),
    ),
    "Llama-3.2-1B": (
        ("lora", 8, {"rows": 2}),
        ("full", 16, {"method": FULL, "rows": 2}),
        ("lora-checkpointing", 12, {"rows": 4, "levers": [CHECKPOINTING]}),
    ),
    "opt-1.3b": (
        ("lora", 12, {"rows": 4}),
        ("bitfit", 8, {"method": {"name": "bitfit"}, "rows": 4}),
    ),
    "Qwen2.5-1.5B": (
        ("lora", 8, {"rows": 1}),
        ("full", 24, {"method": FULL, "rows": 2}),
        ("lora-wide", 16, {"method": WIDE, "rows": 2}),
    ),
    "gemma-2-2b": (
        ("lora", 12, {"rows": 1}),
        ("lora-checkpointing", 16, {"rows": 2, "levers": [CHECKPOINTING]}),
    ),
    "Llama-3.2-3B": (
        ("lora-checkpointing", 8, {"rows": 1, "levers": [CHECKPOINTING]}),
        ("lora", 16, {"rows": 2}),
        ("full-8bit", 24, {"method": FULL, "optimizer": "adamw_8bit", "levers": [CHECKPOINTING]}),
    ),
    "Llama-3.1-8B": (
        ("lora", 24, {"rows": 1}),
        ("lora-checkpointing", 24, {"rows": 4, "levers": [CHECKPOINTING]}),
    ),
    "roberta-large": (("full-float32", 8, {"method": FULL, "rows": 8, "wide": True}),),
    "t5-base": (("lora", 8, {"rows": 4}), ("full", 12, {"method": FULL, "rows": 4})),
}

QUANTISED = ("bert-base-uncased", "SmolLM2-360M", "Qwen3-0.6B", "Llama-3.2-1B", "opt-1.3b",
             "Qwen2.5-1.5B", "Llama-3.1-8B")  # fmt: skip


def cases() -> list[Case]:
    """All recipes: those of fresh weights by turns over the models, so that a part is no special
    part; then those of stored weights, model after model, so that each file is written once.
    """
    by_model = [list(_of_model(name, shape)) for name, shape in SHAPES.items()]
    turns = [c for turn in itertools.zip_longest(*by_model) for c in turn or () if c is not None]
    out = [case for group in turns for case in group]
    for model in QUANTISED:
        out += _quantised(model, SHAPES[model])
    return out


def _of_model(model: str, shape: Shape) -> Iterator[list[Case]]:
    boundaries = iter(BOUNDARIES.get(model, ()))
    for number, (label, each, fields) in enumerate(_settings(shape)):
        cap = _cap(shape.billions * each / 1.074, number)
        yield [_case(model, shape, label, cap, fields, traced=label == "lora")]
        if number % 3 == 0:
            yield _pair(model, shape, next(boundaries, None))
    for boundary in boundaries:
        yield _pair(model, shape, boundary)


def _pair(model: str, shape: Shape, boundary: tuple[str, int, dict[str, Any]] | None) -> list[Case]:
    if boundary is None:
        return []
    label, cap, fields = boundary
    sides: tuple[Side, ...] = ("below", "above")
    return [
        _case(model, shape, f"{label}-boundary", cap, {"length": SHORTEST, **fields}, side=side)
        for side in sides
    ]


def _quantised(model: str, shape: Shape) -> Iterator[Case]:
    wide = {"method": WIDE, "rows": 1, "length": 512}
    many = {"rows": 4, "length": 1024}
    for bits, fields in (("nf4", wide), ("int8", wide), ("nf4", many), ("int8", many)):
        levers = [f"{bits}_weights"] + ([CHECKPOINTING] if fields is many else [])
        label = f"lora-{bits}" + ("-checkpointing" if fields is many else "")
        cap = 12 if bits == "int8" and shape.billions > 4 else 8
        yield _case(model, shape, label, cap, {**fields, "levers": levers}, stored=True)


def _cap(states_gib: float, number: int) -> int:
    """The smallest budget with room beside weights and states, or the next larger one."""
    room = [cap for cap in CAPS if cap > states_gib * 1.1 + 1.5] or [CAPS[-1]]
    return room[min(number % 2, len(room) - 1)]


def _case(
    model: str, shape: Shape, label: str, cap: int, fields: dict[str, Any], *,
    side: Side | None = None, stored: bool = False, traced: bool = False,
) -> Case:  # fmt: skip
    name = f"{model}-{label}-{cap}gib" + (f"-{side}" if side else "")
    raw = _raw(model, shape, cap, fields)
    if stored:
        raw["model"]["init"] = "pretrained"
    return Case(name.lower(), model, raw, shape.longest, side, stored, traced)


def _raw(model: str, shape: Shape, cap: int, fields: dict[str, Any]) -> dict[str, Any]:
    rows, wide = fields.get("rows", 1), fields.get("wide", False)
    optimizer: dict[str, Any] = {"name": fields.get("optimizer", "adamw"), "lr": 1e-5}
    if fields.get("foreach"):
        optimizer["implementation"] = "foreach"
    if shape.kind == "encoder":
        objective = "label_words" if fields.get("answers") else "classification"
        task: dict[str, Any] = {"name": "sst2"}
        about: dict[str, Any] = {"name": objective}
    else:
        answers = fields.get("answers") or shape.kind == "encoder_decoder"
        task = {"name": "gsm8k"} if answers else {"name": "text", "files": ["none.txt"]}
        about = {"name": "next_token", "max_new_tokens": 16}
    return {
        "schema": 1,
        "model": {
            "checkpoint": model, "init": "random", "dtype": "float32" if wide else "bfloat16",
            "attention": fields.get("attention", shape.attention),
        },
        "task": task,
        "method": fields.get("method", LORA),
        "freezing": fields.get("freezing", {"name": "none"}),
        "objective": about,
        "optimizer": optimizer,
        "levers": [{"name": lever} for lever in fields.get("levers", ())],
        "loop": {
            "steps": STEPS, "micro_batch_size": rows,
            "global_batch_size": rows * fields.get("accumulation", 1),
            "max_length": min(fields["length"], shape.longest),
            "precision": "bf16" if wide else "no", "seed": 1,
        },
        "budget": {"device_gib": cap},
    }  # fmt: skip
