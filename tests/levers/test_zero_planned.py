"""Of DeepSpeed's settings, given by fields or by a JSON: which are planned, and as what."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lowres
from lowres.bridges.deepspeed_fetches import Fetches
from lowres.bridges.deepspeed_parts import HERE, divide
from lowres.bridges.deepspeed_settings import Settings, planned_settings
from lowres.core.errors import NotPlanned
from lowres.levers.zero import Zero
from lowres.memory import device as devices
from lowres.planning.plan import plan

AUTO = dict.fromkeys(
    ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
     "gradient_clipping"], "auto",
)  # fmt: skip
BOTH: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stage 2": (
        {"offload_optimizer": "none", "bucket_elements": 20_000},
        {"stage": 2, "reduce_bucket_size": 2e4, "contiguous_gradients": True},
    ),
    "stage 3": (
        {
            "stage": 3,
            "offload_optimizer": "none",
            "offload_parameters": "cpu",
            "pin_memory": True,
            "bucket_elements": 20_000,
        },
        {
            "stage": 3,
            "reduce_bucket_size": 20_000,
            "stage3_prefetch_bucket_size": 20_000,
            "offload_param": {"device": "cpu"},
            "overlap_comm": True,
        },
    ),
    "stage 1, pinned": (
        {"stage": 1, "pin_memory": True},
        {"stage": 1, "reduce_bucket_size": 5_000_000, "offload_optimizer": {"device": "cpu"}},
    ),
}


@pytest.mark.parametrize("case", BOTH)
def test_a_json_is_planned_as_the_fields_are(
    case: str, raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Reference: the plan of the fields, phase by phase, device and host. DeepSpeed pins what it
    offloads where a JSON does not say otherwise."""
    fields, zero = BOTH[case]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(AUTO | {"fp16": {"enabled": "auto"}, "zero_optimization": zero}))
    made = []
    for lever in (fields, {"config": str(path)}):
        keys = raw_recipe(objective="label_words", levers=[{"name": "zero"} | lever])
        found = plan(lowres.load_recipe(keys), devices.generic(8.0))
        made.append({n: (p.live_bytes, p.host_bytes) for n, p in found.phases.items()})
    assert made[0] == made[1]
    assert (made[0]["steady_steps"][1] > 0) == (case != "stage 2")


NOT_PLANNED: dict[str, dict[str, Any]] = {
    "zero_optimization.round_robin_gradients true": {"round_robin_gradients": True},
    "zero_optimization.contiguous_gradients false": {"contiguous_gradients": False},
    "zero_optimization.sub_group_size 1000": {"sub_group_size": 1000},
    "zero_optimization.zero_quantized_gradients true": {"zero_quantized_gradients": True},
    "zero_optimization.overlap_comm true": {"overlap_comm": True, "stage": 1},
    "zero_optimization.zero_quantized_weights true": {"stage": 3, "zero_quantized_weights": True},
    "zero_optimization.stage3_allgather_sequential true":
        {"stage": 3, "stage3_allgather_sequential": True},
    "zero_optimization.stage3_max_live_parameters 1000": {"stage3_max_live_parameters": 1000},
    "zero_optimization.offload_optimizer.ratio 0.5":
        {"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
    "activation_checkpointing.cpu_checkpointing true":
        {"above": {"activation_checkpointing": {"cpu_checkpointing": True}}},
    "data_types.grad_accum_dtype \"fp32\"":
        {"above": {"data_types": {"grad_accum_dtype": "fp32"}}},
    "zero_optimization.offload_optimizer.pipeline_read true":
        {"stage": 3, "offload_optimizer": {"device": "nvme", "pipeline_read": True}},
    "zero_optimization.offload_optimizer.fast_init true":
        {"stage": 3, "offload_optimizer": {"device": "nvme", "fast_init": True}},
    "aio.use_gds true":
        {"stage": 3, "offload_param": {"device": "nvme"}, "above": {"aio": {"use_gds": True}}},
}  # fmt: skip


@pytest.mark.parametrize("said", NOT_PLANNED)
def test_what_would_be_planned_wrong_is_named(said: str) -> None:
    """Behaviour: the key stands in the message; the same settings without it are planned."""
    zero = dict(NOT_PLANNED[said])
    above = zero.pop("above", {})
    with pytest.raises(NotPlanned, match=said):
        planned_settings({"zero_optimization": {"stage": 2} | zero} | above)
    planned_settings({"zero_optimization": {"stage": 2}})


def test_what_changes_no_bytes_is_planned() -> None:
    """Behaviour: sections that are off, batch sizes, DeepSpeed's own defaults."""
    off = {"flops_profiler": {"enabled": False, "profile_step": 1}, "steps_per_print": 10}
    zero = {
        "stage": 2,
        "overlap_comm": True,
        "reduce_scatter": True,
        "round_robin_gradients": False,
    }
    found = planned_settings(AUTO | off | {"bf16": {"enabled": "auto"}, "zero_optimization": zero})
    assert found.overlap and not found.offload and found.bucket == 500_000_000


def test_an_automatic_bucket_is_made_from_the_hidden_size() -> None:
    """Closed form: accelerate's, the square of the hidden size, or of the largest of several."""
    found = planned_settings({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}})
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=12))
    assert found.bucket_elements(model) == 144
    model.config = SimpleNamespace(hidden_sizes=[4, 5])
    assert found.bucket_elements(model) == 25
    with pytest.raises(NotPlanned, match="hidden size"):
        found.bucket_elements(SimpleNamespace())


def test_every_field_is_read() -> None:
    """Behaviour: what the fields say is planned by the same reading as a JSON."""
    lever = Zero(stage=1, offload_optimizer="cpu", pin_memory=True, bucket_elements=7)
    found = planned_settings(lever._settings())
    assert (found.stage, found.offload, found.pinned, found.bucket) == (1, True, True, 7)


@pytest.mark.parametrize("processes", [1, 2])
def test_on_a_card_stage_3_parts_device_and_host(
    processes: int, raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Closed form: of a process's share of the trained parameters, float32, the host holds master,
    gradient, collected gradients and two states (20 bytes), and the weights themselves, which
    DeepSpeed pins and torch rounds up to a power of two; frozen weights that are large enough to be
    divided wait there as they are. A step counter for each tensor of states is beside it."""
    here = {"device": "cpu", "pin_memory": False}
    zero = {"stage": 3, "offload_optimizer": here, "offload_param": here}
    zero |= {"stage3_param_persistence_threshold": 100, "reduce_bucket_size": 20_000}
    (tmp_path / "ds.json").write_text(json.dumps(AUTO | {"zero_optimization": zero}))
    lever = {"name": "zero", "config": str(tmp_path / "ds.json")}
    keys = raw_recipe(objective="label_words", method="lora", levers=[lever])
    weights = load_file(Path(keys["model"]["checkpoint"]) / "model.safetensors")
    found = plan(lowres.load_recipe(keys), devices.generic(8.0), processes=processes)
    share = found.trainable // processes
    flat = 1 << (4 * share - 1).bit_length()
    frozen = [w.numel() for w in weights.values() if w.numel() > 100]
    waiting = 4 * sum(frozen) // processes
    assert waiting > 0
    steady = found.phases["steady_steps"]
    assert 0 <= steady.host_bytes - (20 * share + flat + waiting) <= 8
    assert "optimizer states" not in steady.categories


def test_what_is_fetched_ahead_and_what_stays() -> None:
    """Behaviour: in the first pass each parameter is let go when its module is done; once the pass
    is known the next ones are fetched before, and small ones stay."""
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(3)))
    parts = divide(model, 2, HERE, 0)
    divided = {"stage3_prefetch_bucket_size": 64, "stage3_max_live_parameters": 10**9,
               "stage3_max_reuse_distance": 0}  # fmt: skip
    settings = Settings(3, False, False, False, 100, divided=divided)
    fetches = Fetches(model, parts, settings, 2)
    seen = []
    for _ in range(2):
        fetches.begin()
        for layer in model:
            fetches.fetch(layer, forward=True)
            seen.append([part.state for part in parts.values()])
            fetches.release(layer, forward=True)
    assert [p.parameter.numel() for p in parts.values()] == [0, 0, 0]
    assert seen[:3] == [
        ["whole", "apart", "apart"], ["apart", "whole", "apart"], ["apart", "apart", "whole"],
    ]  # fmt: skip
    assert seen[3:] == [
        ["whole", "coming", "apart"], ["apart", "whole", "coming"], ["apart", "apart", "whole"],
    ]  # fmt: skip
