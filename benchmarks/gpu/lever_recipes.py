"""The recipes of the levers' GPU suite: each lever and optimizer alone, ladders, targets, parity.

Which levers and optimizers there are is asked of the registry; where a recipe refuses one, the next
way to train is tried. Beside each stands the plain recipe, which the whole device is given.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from benchmarks.gpu.recipes import FULL, SHAPES, STEPS, Case, Shape, _raw
from lowres.core import registry
from lowres.core.errors import InputError
from lowres.core.parts import Lever
from lowres.core.reading import load_recipe
from lowres.levers._weights import Weights

Group = Literal["target", "recipe", "parity", "ladder", "alone", "optimizer"]
Part = dict[str, Any]

PARITY = 1e-4
"""Relative, of losses in float32: cut into pieces, a product is summed up by another kernel. On a
CPU the contracts of the levers hold them to 1e-5."""
FILES = Path(__file__).resolve().parent.parent.parent / "recipes" / "gsm8k"
SMALL, LARGE = "Llama-3.2-1B", "Llama-3.1-8B"
TINY = Shape("decoder", 0.0, 3, longest=128)

# Without dropout, which feed-forward parts in tiles refuse; its masks also differ where rows change
# their micro-batch.
WIDE: Part = {"name": "lora", "rank": 16, "alpha": 32, "targets": "all-linear"}
SLICES: Part = {"name": "chunked_logits", "chunk": 128}
QLORA = ("nf4_weights", "gradient_checkpointing", SLICES)
EIGHT_BIT: Part = {"name": "adamw_8bit", "lr": 1e-5}
LORA_LADDER = (
    "nf4_weights", "gradient_checkpointing", SLICES, "tiled_mlp", "activation_offload",
    EIGHT_BIT, "frozen_offload", {"name": "paged_adamw_8bit", "lr": 1e-5},
)  # fmt: skip
FULL_LADDER = (
    "gradient_checkpointing", SLICES, "tiled_mlp", "activation_offload", "optimizer_in_backward",
    "optimizer_offload",
)  # fmt: skip
"""Levers and optimizers, each with all levers before it."""


@dataclass(frozen=True)
class Way:
    """A plain way to train, in which levers are tried."""

    name: str
    method: Part
    wide: bool = False
    accumulation: int = 1


LORA_WAYS = (Way("lora", WIDE, accumulation=2), Way("lora", WIDE), Way("lora-float32", WIDE, True))
FULL_WAYS = (Way("full", FULL, accumulation=2), Way("full", FULL))


@dataclass(frozen=True)
class LeverCase(Case):
    """A recipe of this suite.

    Args:
        beside: The plain recipe that is run beside it, by name.
        tolerance: Of the first two losses against those beside it; None where they may differ.
    """

    group: Group = "alone"
    beside: str | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Scale:
    """Shapes and caps of a run of the suite."""

    small: str
    large: str
    tiny: bool

    def shape(self, model: str) -> Shape:
        return TINY if self.tiny else SHAPES[model]

    def cap(self, device_gib: float | None) -> float | None:
        return None if self.tiny else device_gib


def cases(tiny: bool) -> list[Case]:
    """All recipes, what matters most first; each plain one before the one that it stands beside."""
    scale = Scale("decoder", "decoder", True) if tiny else Scale(SMALL, LARGE, False)
    made: dict[str, Case] = {}
    for group in (_targets, _files, _parity, _ladders, _alone, _optimizers):
        for case in group(scale):
            made.setdefault(case.name, case)
    return list(made.values())


def _targets(scale: Scale) -> Iterator[Case]:
    """What the levers are for. The card's own capacity, not that of the machine at hand."""
    small, more = (*QLORA, "tiled_mlp"), ("activation_offload",)
    full = ("gradient_checkpointing", SLICES, "optimizer_in_backward", "optimizer_offload")
    for name, card, method, levers, optimizer, length in (
        ("qlora-2048-8gib", "rtx-4060", WIDE, QLORA, EIGHT_BIT, 2048),
        ("qlora-3000-8gib", "rtx-4060", WIDE, small, EIGHT_BIT, 3000),
        ("qlora-3000-offload-8gib", "rtx-4060", WIDE, (*small, *more), EIGHT_BIT, 3000),
        ("qlora-2048-4gib", 4.0, WIDE, (*small, *more, "frozen_offload"), EIGHT_BIT, 2048),
        ("full-offload-2048-24gib", "rtx-3090", FULL, full, None, 2048),
        ("full-lomo-2048-24gib", "rtx-3090", FULL, full[:2], {"name": "lomo", "lr": 1e-5}, 2048),
    ):
        way = Way(name.partition("-")[0], method)
        fields = {"levers": levers, "optimizer": optimizer, "length": length}
        yield from _pair(scale, scale.large, "target", name, way, fields,
                         card=None if scale.tiny else card)  # fmt: skip


def _files(scale: Scale) -> Iterator[Case]:
    """The recipes of this model as they are published, at their budgets, for a few updates."""
    for file in sorted(FILES.glob("llama-3.1-8b-*.yaml")):
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        stored = any(_is_form(lever) for lever in raw["levers"])
        raw["model"] = {"checkpoint": scale.large, "dtype": raw["model"]["dtype"],
                        "init": "pretrained" if stored else "random"}  # fmt: skip
        loop = {k: v for k, v in raw["loop"].items() if k not in ("epochs", "save_every")}
        raw["loop"] = loop | {"steps": STEPS}
        if scale.tiny:
            raw["loop"] |= {"micro_batch_size": 2, "global_batch_size": 2, "max_length": 32}
            raw["objective"]["max_new_tokens"] = 4
            if "frozen" in raw.get("freezing", {}):
                raw["freezing"]["frozen"] = TINY.blocks - 1
            del raw["budget"]
        longest = scale.shape(scale.large).longest
        name = f"recipe-{file.stem}"
        yield LeverCase(name, scale.large, raw, longest, stored=stored, group="recipe")


def _parity(scale: Scale) -> Iterator[Case]:
    """Each exact lever in float32, over rows of several lengths and several micro-batches."""
    # With a large eps an update is nearly proportional to its gradient: AdamW's first ones are else
    # signs, which rounding turns over.
    smooth = {"name": "adamw", "lr": 0.1, "eps": 1.0}
    for name in registry.names("lever"):
        if registry.load("lever", name).effect == "exact":
            fields = {"levers": [_part("lever", name)], "optimizer": smooth, "steps": 2,
                      "length": 256, "rows": 4, "precision": "no",
                      "needed": _needed(registry.load("lever", name))}  # fmt: skip
            ways = [dataclasses.replace(w, wide=True) for w in (*LORA_WAYS, *FULL_WAYS)]
            yield from _first(scale, scale.small, "parity", name, ways, fields, varied=True)


def _ladders(scale: Scale) -> Iterator[Case]:
    """Cumulative, each rung under the smallest of the caps that it is planned to fit."""
    for model in dict.fromkeys((scale.large, scale.small)):
        for way, rungs in ((Way("lora", WIDE), LORA_LADDER), (Way("full", FULL), FULL_LADDER)):
            fields: Part = {"levers": [], "optimizer": None, "length": 2048}
            caps = iter(CAPS.get((model, way.name), ()))
            for number, rung in enumerate(rungs, start=1):
                name = rung if isinstance(rung, str) else rung["name"]
                if name in registry.names("optimizer"):
                    fields = {**fields, "optimizer": rung}
                else:
                    fields = {**fields, "levers": [*fields["levers"], rung]}
                yield from _pair(scale, model, "ladder", f"{way.name}-{number}-{name}", way,
                                 fields | {"cap": next(caps, None)})  # fmt: skip


CAPS = {
    (LARGE, "lora"): (None, 12, 8, 8, 8, 8, 4, 4),
    (LARGE, "full"): (None, None, None, None, None, 24),
    (SMALL, "lora"): (24, 8, 8, 8, 8, 8, 8, 8),
    (SMALL, "full"): (24, 12, 12, 12, 12, 8),
}
"""GiB of the rungs; None: the whole device."""


def _alone(scale: Scale) -> Iterator[Case]:
    """Each lever in the plain recipes, where it is accepted."""
    for model, cap in ((scale.small, 16), (scale.large, 24)):
        fields: Part = {"rows": 4 if model == SMALL else 1, "length": 512, "cap": cap}
        for name in registry.names("lever"):
            lever = registry.load("lever", name)
            varied = lever.on_batching is not Lever.on_batching
            for ways in (LORA_WAYS, FULL_WAYS) if model != LARGE else (LORA_WAYS[:2],):
                told = fields | {"levers": [_part("lever", name)], "needed": _needed(lever)}
                if varied:
                    told |= {"rows": 4}
                yield from _first(scale, model, "alone", name, ways, told, varied=varied)


def _optimizers(scale: Scale) -> Iterator[Case]:
    """Each optimizer in place of AdamW."""
    for model, ways in ((scale.small, FULL_WAYS), (scale.large, LORA_WAYS[:2])):
        for name in registry.names("optimizer"):
            one = {**_part("optimizer", name), "lr": 1e-5}
            if not scale.tiny:
                one = {"name": name, "lr": 1e-5}  # samples are sized for small models
            fields = {"levers": [], "optimizer": one, "length": 512, "cap": 24}
            yield from _first(scale, model, "optimizer", name, ways, fields)


def _first(
    scale: Scale, model: str, group: Group, name: str, ways: Any, fields: Part, varied: bool = False
) -> Iterator[Case]:
    """In the first way that accepts it; nothing where none does."""
    for way in ways:
        try:
            load_recipe(_keys(scale, model, way, fields))
        except InputError:
            continue
        yield from _pair(scale, model, group, f"{way.name}-{name}", way, fields, varied=varied)
        return


def _pair(
    scale: Scale, model: str, group: Group, name: str, way: Way, fields: Part, *,
    card: str | float | None = None, varied: bool = False,
) -> Iterator[Case]:  # fmt: skip
    """The plain recipe with the whole device, and the one that is looked at."""
    own = f"{model}-{group}-{name}".lower()
    plain = {**fields, "levers": [], "cap": None}
    if group != "parity":
        plain["optimizer"] = None
    longest = scale.shape(model).longest
    yield LeverCase(f"{own}-plain", model, _keys(scale, model, way, plain), longest,
                    varied=varied, group=group)  # fmt: skip
    yield LeverCase(
        own, model, _keys(scale, model, way, fields), longest, card=card, varied=varied,
        stored=any(map(_is_form, fields["levers"])), group=group, beside=f"{own}-plain",
        tolerance=PARITY if group == "parity" else None,
    )  # fmt: skip


def _keys(scale: Scale, model: str, way: Way, fields: Part) -> Part:
    """The keys of a recipe."""
    length = 32 if scale.tiny else fields["length"]
    rows = fields.get("rows", 1)
    shape = scale.shape(model)
    usual = {"method": way.method, "rows": rows, "accumulation": way.accumulation,
             "length": length, "wide": way.wide}  # fmt: skip
    raw = copy.deepcopy(_raw(model, shape, 0, usual))
    raw["levers"] = [{"name": x} if isinstance(x, str) else dict(x) for x in fields["levers"]]
    raw["optimizer"] = fields.get("optimizer") or {"name": "adamw", "lr": 1e-5}
    raw["objective"]["max_new_tokens"] = 4
    raw["budget"] = {"device_gib": scale.cap(fields.get("cap"))}
    if any(map(_is_form, raw["levers"])):
        raw["model"]["init"] = "pretrained"
    if "precision" in fields:
        raw["loop"]["precision"] = fields["precision"]
    raw["loop"]["steps"] = fields.get("steps", STEPS)
    # A norm over all gradients excludes levers; without several micro-batches nothing needs one.
    raw["loop"]["max_grad_norm"] = None
    return raw | copy.deepcopy(fields.get("needed", {}))


def _needed(lever: Any) -> Part:
    """Sections of a recipe that a lever needs, for the plain one too."""
    return {key: told for key, told in lever.sample_recipe.items() if key != "loop"}


def _part(family: str, name: str) -> Part:
    return {"name": name, **registry.load(family, name).sample_fields}


def _is_form(lever: str | Part) -> bool:
    """Whether it holds weights of a checkpoint in another form, which fresh ones are not."""
    name = lever if isinstance(lever, str) else lever["name"]
    return issubclass(registry.load("lever", name), Weights)
