"""A recipe for a model alone: where a plan or a search begins when no file is given."""

from __future__ import annotations

from typing import Any

from lowres.bridges import rehearsal, tokenizers
from lowres.bridges.kinds import kind_of
from lowres.core import registry
from lowres.core.errors import InputError
from lowres.core.learner import Kind
from lowres.planning import assumed

_TASKS: dict[Kind, str] = {
    "decoder": "gsm8k", "encoder": "sst2", "encoder_decoder": "gsm8k", "vision": "digits",
}  # fmt: skip


def starting_recipe(model: str, task: str | None = None) -> dict[str, Any]:
    """Keys of a recipe: LoRA on every linear layer over 16-bit weights, one row at a time.

    Args:
        model: As `model.checkpoint` in a recipe.
        task: Of `lowres list tasks`; chosen by the model's kind when None.

    Raises:
        InputError: For a model without a configuration, an unknown task, or one that asks for text
            of a model that writes none.
    """
    config = assumed.config_of(model)
    kind = kind_of(config)
    name = task or _TASKS[kind]
    if name not in registry.names("task"):
        raise InputError("--task", [registry.unknown("task", name)])
    cls: Any = registry.load("task", name)
    fields: dict[str, Any] = {"checkpoint": model, "dtype": "bfloat16"}
    objective = "classification" if cls.asks == "label" else "next_token"
    heads = registry.load("objective", objective).heads  # type: ignore[attr-defined]
    if kind not in heads:
        text = f"'{name}' asks for a text, and '{model}' is a(n) {kind}; choose a task with labels"
        raise InputError("--task", [text])
    if not rehearsal.has_fused_attention(config, heads[kind]):
        fields["attention"] = "eager"
    pad_token = tokenizers.missing_pad_token(model)
    if pad_token is not None:
        fields["pad_token"] = pad_token
    return {
        "schema": 1,
        "model": fields,
        "task": {"name": name},
        "method": {"name": "lora", "rank": 16, "alpha": 32, "targets": "all-linear"},
        "objective": {"name": objective},
        "optimizer": {"name": "adamw", "lr": 2e-4},
        "levers": [],
        "loop": {
            "epochs": 1,
            "micro_batch_size": 1,
            "global_batch_size": 16,
            "max_length": 512,
            "warmup_ratio": 0.03,
            "schedule": "cosine",
            "save_every": 100,
        },
    }
