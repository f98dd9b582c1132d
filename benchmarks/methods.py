"""What each method keeps in memory, measured on the CPU at one shape beside its plan.

    python -m benchmarks.methods [--only NAME]

Every method of the registry is run for three updates on an OPT of six blocks, four rows of 128
tokens, float32, AdamW. The figures are live bytes, exact and the same on every run. A method whose
record is there is kept, so the command goes on where it was stopped, and what is new is measured.
Writes `benchmarks/records/methods/cpu/<method>.json`, of which `make pages` makes the tables in
docs/methods.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import lowres
from benchmarks.levers import ROOT, STEPS, of_updates
from lowres.core import registry
from lowres.core.engine import BackPropagation
from lowres.core.errors import InputError
from lowres.core.reading import load_recipe
from lowres.memory import device as devices
from lowres.memory.live import LiveBytes
from lowres.memory.tracer import Tracer
from lowres.planning.plan import plan

RECORDS = ROOT / "benchmarks" / "records" / "methods" / "cpu"
TOKENIZER = ROOT / "lowres" / "assets" / "tiny_lm"
SHAPE: dict[str, int] = {
    "blocks": 6, "hidden": 256, "inner": 1024, "heads": 4, "vocabulary": 4096, "rows": 4,
    "tokens": 128,
}  # fmt: skip
FIGURES = ("saved_bytes", "gradient_bytes", "state_bytes", "added_bytes", "peak_bytes")
FULL = "full"


@dataclass
class Seen:
    """What updates held, of the last one that was watched."""

    saved_bytes: int = 0
    gradient_bytes: int = 0
    state_bytes: int = 0
    model_bytes: int = 0
    trainable: int = 0


def storages(tensors: Iterable[Any]) -> int:
    """Bytes of tensors, each storage once."""
    found = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for t in tensors
        if isinstance(t, torch.Tensor)
    }
    return sum(found.values())


def live() -> int | None:
    """Bytes alive now, as the run's probe or the plan's trace counts them; None between these."""
    for mode in reversed(_get_current_dispatch_mode_stack()):
        if isinstance(mode, LiveBytes):
            return mode.now_bytes
        if isinstance(mode, Tracer):
            return sum(mode.trace.sizes)
    return None


@contextlib.contextmanager
def watching(recipe: Any) -> Iterator[Seen]:
    """Look at what a forward pass leaves behind and what an update holds, in a run or in a plan."""
    seen, objective = Seen(), type(recipe.objective)
    loss, update = objective.loss, BackPropagation.update

    def watched_loss(self: Any, learner: Any, batch: Any) -> Any:
        before = live()
        out = loss(self, learner, batch)
        after = live()
        if torch.is_grad_enabled() and before is not None and after is not None:
            seen.saved_bytes = after - before
        return out

    def watched_update(self: Any, lr: float, max_grad_norm: float | None) -> Any:
        base = self.learner.base
        seen.gradient_bytes = storages(p.grad for p in base.parameters())
        seen.model_bytes = storages([*base.parameters(), *base.buffers()])
        seen.trainable = sum(p.numel() for p in base.parameters() if p.requires_grad)
        out = update(self, lr, max_grad_norm)
        states = self.optimizer.state.values()
        seen.state_bytes = storages(value for state in states for value in state.values())
        return out

    with (
        mock.patch.object(objective, "loss", watched_loss),
        mock.patch.object(BackPropagation, "update", watched_update),
    ):
        yield seen


def write_model(folder: Path) -> Path:
    """A decoder with biases and norms of every kind, so that each method has a place in it."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    hidden = SHAPE["hidden"]
    config = OPTConfig(
        vocab_size=SHAPE["vocabulary"], hidden_size=hidden, word_embed_proj_dim=hidden,
        ffn_dim=SHAPE["inner"], num_hidden_layers=SHAPE["blocks"],
        num_attention_heads=SHAPE["heads"], max_position_embeddings=512, dropout=0.0,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(model: Path, method: str) -> Any:
    """Three updates of full rows; of AdamW, one micro-batch an update."""
    return load_recipe({
        "model": {"checkpoint": str(model)},
        "task": {
            "name": "text", "files": [str(ROOT / "docs" / "planning.md")], "eval_examples": 1,
            "valid_files": [str(ROOT / "docs" / "adding.md")],
        },
        "method": {"name": method},
        "objective": "next_token",
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "loop": {
            "steps": 3, "micro_batch_size": SHAPE["rows"], "global_batch_size": SHAPE["rows"],
            "max_length": SHAPE["tokens"], "max_grad_norm": None,
        },
    })  # fmt: skip


def one(model: Path, plain_bytes: int, parameters: int, method: str) -> dict[str, Any]:
    """A method's record; why there are no figures where it refuses the model or the recipe."""
    from lowres.bench.compatibility import surroundings

    told = {"method": method, "shape": SHAPE, "environment": surroundings()}
    try:
        asked = recipe(model, method)
        with watching(asked) as seen, tempfile.TemporaryDirectory() as folder:
            record = lowres.run(asked, output_folder=Path(folder) / "run", quiet=True, force=True)
        with watching(asked) as foreseen:
            planned = plan(asked, devices.load("cpu"), exact=True)
    except InputError as error:
        return told | {"refused": str(error.problems[0])}
    phases = record.measured.phases
    peak = max(phases[p].live_bytes or 0 for p in STEPS)
    return told | {
        "settings": asked.resolved()["method"],
        "trainable": seen.trainable,
        "parameters": parameters,
        "saved_folder_bytes": record.measured.saved_bytes,
        "measured": _figures(seen, plain_bytes, peak),
        "planned": _figures(foreseen, plain_bytes, of_updates(planned)),
    }


def _figures(seen: Seen, plain_bytes: int, peak: int) -> dict[str, int]:
    added = seen.model_bytes - plain_bytes
    return dict(
        zip(FIGURES, (seen.saved_bytes, seen.gradient_bytes, seen.state_bytes, added, peak),
            strict=True)
    )  # fmt: skip


def records() -> dict[str, dict[str, Any]]:
    """All records, by method."""
    found = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(RECORDS.glob("*.json"))]
    return {record["method"]: record for record in found}


def measured_now(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Records of methods, made by runs, without what is of this place alone."""
    from transformers import OPTForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "opt")
        plain = OPTForCausalLM.from_pretrained(model)
        held = storages([*plain.parameters(), *plain.buffers()])
        count = sum(p.numel() for p in plain.parameters())
        del plain
        found = {}
        for name in names:
            text = json.dumps(one(model, held, count, name))
            found[name] = json.loads(text.replace(folder, "temporary"))
            print(name, found[name].get("refused") or found[name]["measured"], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    RECORDS.mkdir(parents=True, exist_ok=True)
    wanted = [n for n in registry.names("method") if arguments.only in ("", n)]
    missing = [n for n in wanted if not (RECORDS / f"{n}.json").exists()]
    if missing:
        for name, record in measured_now(missing).items():
            text = json.dumps(record, indent=1)
            (RECORDS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
