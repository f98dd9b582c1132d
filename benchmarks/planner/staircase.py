"""The published memory ladder of torchtune beside plans from configuration alone.

    python -m benchmarks.planner.staircase

Source: README of torchtune (github.com/pytorch/torchtune), peak active memory: Llama 3.2 3B on an
A100 with rows of 4,096 tokens, and Llama 3.1 8B on an RTX 4090 with rows of 2,048, two rows each.
Compiled steps are not planned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowres.core import paths
from lowres.core.reading import load_recipe
from lowres.core.units import GIB
from lowres.memory import device as devices
from lowres.planning.assumed import assumed_inputs
from lowres.planning.plan import plan
from lowres.planning.starting import starting_recipe

RECORD = Path(__file__).resolve().parent.parent / "records" / "planner" / "staircase.json"
FULL = ["method=full"]
FOREACH = 'optimizer={"name": "adamw", "lr": 2.0e-5, "implementation": "foreach"}'
LORA = 'method={"name": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"}'
ADAMW_8BIT = 'optimizer={"name": "adamw_8bit", "lr": 2.0e-5}'
PAGED = 'optimizer={"name": "paged_adamw_8bit", "lr": 2.0e-5}'
UNCLIPPED = "loop.max_grad_norm=null"  # an update within backward knows no norm of all gradients
COMPILED = "theirs: compiled"


def levers(*names: str) -> str:
    return f"levers=[{', '.join(names)}]"


CHUNKED = levers("chunked_logits")
RECOMPUTED = levers("chunked_logits", "gradient_checkpointing")
IN_BACKWARD = levers("chunked_logits", "gradient_checkpointing", "optimizer_in_backward")
MOVED = levers("chunked_logits", "gradient_checkpointing", "activation_offload")
ALL = levers(
    "chunked_logits", "gradient_checkpointing", "activation_offload", "optimizer_in_backward"
)
MOVED_NF4 = levers("nf4_weights", "chunked_logits", "gradient_checkpointing", "activation_offload")
NF4 = levers("nf4_weights", "chunked_logits", "gradient_checkpointing")

ROWS: list[tuple[str, str, float, list[str] | None, str]] = [
    ("3B", "baseline, padded", 25.5, None, "the lengths of its rows are not published"),
    ("3B", "+ packing", 60.0, [*FULL, FOREACH], "the same: rows of 4,096, nothing else"),
    ("3B", "+ compile", 51.0, None, "compiled steps are not planned"),
    ("3B", "+ chunked cross-entropy", 42.9, [*FULL, FOREACH, CHUNKED], COMPILED),
    ("3B", "+ activation checkpointing", 24.9, [*FULL, FOREACH, RECOMPUTED], COMPILED),
    ("3B", "+ optimizer in backward", 23.1, [*FULL, FOREACH, IN_BACKWARD, UNCLIPPED], COMPILED),
    ("3B", "+ activation offload", 21.8, [*FULL, FOREACH, ALL, UNCLIPPED], COMPILED),
    ("3B", "+ 8-bit AdamW", 17.6, [*FULL, ADAMW_8BIT, ALL, UNCLIPPED], COMPILED),
    ("3B", "LoRA", 8.5, [LORA, MOVED], COMPILED),
    ("3B", "QLoRA", 4.6, [LORA, MOVED_NF4], COMPILED),
    ("8B", "full", 18.9, [*FULL, PAGED, IN_BACKWARD, UNCLIPPED], COMPILED),
    ("8B", "LoRA", 16.2, [LORA, RECOMPUTED], COMPILED),
    ("8B", "QLoRA", 7.4, [LORA, NF4], COMPILED),
]  # fmt: skip


def main() -> None:
    out: list[dict[str, Any]] = []
    for size, name, published, overrides, why in ROWS:
        row: dict[str, Any] = {"model": size, "row": name, "published_gib": published, "why": why}
        out.append(row)
        if overrides is not None:
            model = "Llama-3.2-3B" if size == "3B" else "Llama-3.1-8B"
            length = 4096 if size == "3B" else 2048
            recipe = load_recipe(
                starting_recipe(str(paths.data_folder() / "configs" / model)),
                [*overrides, "loop.micro_batch_size=2", "loop.global_batch_size=2",
                 f"loop.max_length={length}"],
            )  # fmt: skip
            card = devices.load("a100-80gb" if size == "3B" else "rtx-4090")
            # Packed rows are all as long as allowed there.
            found = plan(recipe, card, inputs=assumed_inputs(recipe, padded=False))
            steady = found.phases["steady_steps"]
            logits = steady.categories.get("logits", 0)
            row["planned_gib"] = round((steady.allocated_bytes or 0) / GIB, 2)
            row["of_it_logits_gib"] = round(logits / GIB, 2)
            row["tokens_per_second"] = found.step and round(found.step.tokens_per_second)
        print(row, flush=True)
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
