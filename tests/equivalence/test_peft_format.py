"""What lowres saves, read by plain PEFT and transformers in a process that never imports lowres."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowres

READER = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
base, folder, head, out = sys.argv[1:]
cls = {"classification": AutoModelForSequenceClassification, "causal": AutoModelForCausalLM}[head]
torch.manual_seed(123)
model = PeftModel.from_pretrained(cls.from_pretrained(base), folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(["The king sees the old dog."], return_tensors="pt")
with torch.no_grad():
    torch.save(model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits, out)
assert not [m for m in sys.modules if m.startswith("lowres")]
"""


@pytest.mark.parametrize(
    "kind, objective", [("encoder", "classification"), ("decoder", "label_words")]
)
def test_plain_peft_loads_the_adapter_and_gives_equal_logits(
    kind: str, objective: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Reference: the trained model in memory, bit for bit."""
    from lowres.bridges import transformers

    one = recipe(kind, objective=objective, method="lora")
    built = lowres.build(one)
    built.model.train()
    for _ in range(3):
        one.objective.loss(built.learner, built.collator(built.train_rows[:4])).backward()
        built.optimizer.step()
        built.optimizer.zero_grad()
    built.model.eval()
    folder = tmp_path / "adapter"
    transformers.save(built.model, built.tokenizer, folder)
    subprocess.run(
        [sys.executable, "-c", READER, one.model.checkpoint, str(folder), built.learner.head,
         str(tmp_path / "logits.pt")],
        check=True, timeout=240, cwd=tmp_path,
    )  # fmt: skip
    ids = built.tokenizer(["The king sees the old dog."], return_tensors="pt")
    with torch.no_grad():
        expected = built.model(
            input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]
        ).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] in ("SEQ_CLS", "CAUSAL_LM")
