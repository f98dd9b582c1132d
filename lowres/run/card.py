"""README.md of a saved model: where it comes from, how it scored, how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from lowres.core.recipe import Recipe
from lowres.core.record import RunRecord
from lowres.core.units import format_bytes, format_count, format_seconds

_AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModelForMaskedLM",  # what PEFT calls a masked encoder's prompts
}
"""By PEFT's type of the task; where it has none, its configuration names the model's class."""


def write(folder: Path, recipe: Recipe, record: RunRecord) -> None:
    """Write it into the model's folder."""
    front: dict[str, Any] = {
        "base_model": recipe.model.checkpoint,
        "library_name": "peft" if (folder / "adapter_config.json").exists() else "transformers",
        "tags": ["lowres", recipe.method.name, recipe.task.name],
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        f"# {record.id}",
        "",
        f"`{recipe.model.checkpoint}` fine-tuned with lowres on the task `{recipe.task.name}` "
        f"(version {recipe.task.version}): method `{recipe.method.name}`, objective "
        f"`{recipe.objective.name}`, {len(record.losses)} updates of "
        f"{recipe.loop.global_batch_size} rows.",
        "",
    ]
    if record.scores:
        lines += [
            "| split | metric | value | standard error | n | majority |",
            "|---|---|--:|--:|--:|--:|",
        ]
        for s in record.final_scores():
            base = "" if s.majority is None else f"{s.majority:.4f}"
            lines.append(
                f"| {s.split} | {s.metric} | {s.value:.4f} | {s.stderr:.4f} | {s.n} | {base} |"
            )
        lines.append("")
    measured = record.measured
    if measured.parameters is not None:
        lines.append(
            f"Trained {format_count(measured.parameters.trainable)} of "
            f"{format_count(measured.parameters.total)} parameters"
            + (f", peak of live tensors {format_bytes(measured.peak_live_bytes)}"
               if measured.peak_live_bytes else "")
            + (f", {format_seconds(measured.step_time.p50_seconds)} an update (median)"
               if measured.step_time else "")
            + "."
        )  # fmt: skip
    lines += [
        "",
        *_loading(folder, recipe),
        "",
        "The recipe and the full record lie one folder up.",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _loading(folder: Path, recipe: Recipe) -> list[str]:
    """The code that loads it, to be run in the folder."""
    adapter = folder / "adapter_config.json"
    if not adapter.is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (cls,) = config["architectures"]
        code = [f"from transformers import {cls}", "", f'model = {cls}.from_pretrained(".")']
        return ["```python", *code, "```"]
    config = json.loads(adapter.read_text(encoding="utf-8"))
    cls = _AUTO.get(config["task_type"]) or config["auto_mapping"]["base_model_class"]
    place, named = f'"{recipe.model.checkpoint}"', f', dtype="{recipe.model.dtype}"'
    code = ["import lowres  # the method is its own"] * config["peft_type"].startswith("LOWRES")
    if recipe.model.checkpoint.startswith("package:"):
        module, _, path = recipe.model.checkpoint.removeprefix("package:").partition("/")
        place = f'files("{module}") / "{path}"'
        code.append("from importlib.resources import files")
    if cls.endswith("Classification"):
        named += f", num_labels={len(recipe.task.labels)}"
    if recipe.model.revision is not None:
        named += f', revision="{recipe.model.revision}"'
    code += [
        "from peft import PeftModel",
        f"from transformers import {cls}",
        "",
        f"base = {cls}.from_pretrained({place}{named})",
        'model = PeftModel.from_pretrained(base, ".")',
    ]
    return ["```python", *code, "```"]
