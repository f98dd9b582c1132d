"""What ZeRO holds in memory and in files where it offloads to a disk, and what is refused there.

None of these needs DeepSpeed's reader; its runs are in tests/equivalence/test_zero_nvme.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import lowres
from lowres.bridges import deepspeed_disk, deepspeed_fitting
from lowres.core.errors import InputError
from lowres.levers.zero import Zero
from lowres.memory import device as devices
from lowres.planning.plan import plan

BOTH: dict[str, Any] = {
    "stage": 3,
    "offload_optimizer": "nvme",
    "offload_parameters": "nvme",
    "nvme_path": "/disk",
}
Keys = Callable[..., dict[str, Any]]


@pytest.fixture
def keys(raw_recipe: Keys, wide: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    """A recipe over large weights with the lever, as where a disk can be read."""
    monkeypatch.setattr(deepspeed_disk, "nvme_problem", lambda: None)

    def make(method: str, fields: dict[str, Any]) -> dict[str, Any]:
        lever = {"name": "zero"} | fields
        model = {"checkpoint": str(wide)}
        return raw_recipe(objective="label_words", method=method, levers=[lever], model=model)

    return make


def _aligned(elements: int, width: int = 4) -> int:
    """Bytes that are read and written for so many elements."""
    return -(-elements * width // 1024) * 1024


@pytest.mark.parametrize("processes", [1, 2])
def test_states_on_a_disk_take_four_buffers_of_the_largest_sub_group(
    processes: int, keys: Keys
) -> None:
    """Closed form: of a process's share in float32 the host holds buffers for master, gradient and
    two states, the collected gradients, and the weights, which torch pins in powers of two. The
    norms, too small for the disk, are a sub-group of their own with 16 bytes an element and a step
    counter. On the disk are master, states and the gradients of at least 1 MiB."""
    fields = {"stage": 3, "offload_optimizer": "nvme", "offload_parameters": "cpu"}
    made = keys("full", fields | {"nvme_path": "/disk", "whole_elements": 0})
    found = plan(lowres.load_recipe(made), devices.generic(8.0), processes=processes)
    weights = load_file(Path(made["model"]["checkpoint"]) / "model.safetensors")
    norms = sum(w.numel() for w in weights.values() if w.ndim == 1) // processes
    share = found.trainable // processes
    matrices = share - norms
    pinned = sum(1 << (4 * n - 1).bit_length() for n in (matrices, norms))
    steady = found.phases["steady_steps"].host_bytes
    assert 0 <= steady - (4 * _aligned(matrices) + 16 * norms + 4 * share + pinned) <= 16
    sizes = [w.numel() // processes for w in weights.values() if w.ndim == 2]
    gradients = sum(_aligned(n) for n in sizes if 4 * n >= 2**20)
    assert found.disk_bytes == 3 * _aligned(matrices) + gradients


def test_parameters_on_a_disk_take_buffers_of_the_largest_one(keys: Keys) -> None:
    """Closed form: one more than a block has, of the largest of 1032 x 512; files of all matrices;
    norms wait in memory as they are, and an adapter's parameters as with cpu."""
    host, disk = {}, {}
    for place in ("cpu", "nvme"):
        fields = {"stage": 3, "offload_optimizer": "none", "offload_parameters": place}
        made = keys("lora", fields | {"nvme_path": "/disk", "whole_elements": 0})
        found = plan(lowres.load_recipe(made), devices.generic(8.0))
        host[place], disk[place] = found.phases["steady_steps"].host_bytes, found.disk_bytes
    weights = load_file(Path(made["model"]["checkpoint"]) / "model.safetensors").values()
    large = [w.numel() for w in weights if w.ndim == 2]
    buffers = (7 + 1) * _aligned(1032 * 512)
    assert host["nvme"] - host["cpu"] == buffers - 4 * sum(large)
    assert disk == {"cpu": 0, "nvme": sum(map(_aligned, large))}


def test_a_json_is_planned_as_the_fields_are(keys: Keys, tmp_path: Path) -> None:
    """Reference: the plan of the fields, phase by phase, device, host and disk."""
    place = {"device": "nvme", "nvme_path": "/disk", "pin_memory": False}
    zero = {
        "stage": 3, "reduce_bucket_size": 20_000, "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0,
        "sub_group_size": 1e8, "offload_optimizer": place,
        "offload_param": place | {"buffer_size": 1032 * 512, "buffer_count": 8},
    }  # fmt: skip
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    fields = BOTH | {"whole_elements": 0, "bucket_elements": 20_000}
    made = []
    for lever in (fields, {"config": str(path)}):
        found = plan(lowres.load_recipe(keys("lora", lever)), devices.generic(8.0))
        phases = {n: (p.live_bytes, p.host_bytes) for n, p in found.phases.items()}
        made.append((phases, found.disk_bytes))
    assert made[0] == made[1]


def test_buffers_are_chosen_for_the_largest_parameter_of_a_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Closed form: the embeddings of Llama 3.1 8B, 128256 x 4096, halved by two processes; seven
    matrices a block and one more. Of a model without large parameters next to nothing."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=2,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).requires_grad_(False)
        small = torch.nn.Linear(8, 8)
    monkeypatch.setattr(deepspeed_fitting, "saved_together", lambda model: [])
    settings = Zero(**BOTH, whole_elements=0)._settings()
    for processes in (1, 2):
        found = deepspeed_fitting.fitted(settings, model, processes, torch.bfloat16, choose=True)
        place = found["zero_optimization"]["offload_param"]
        assert place["buffer_size"] == 128_256 * 4096 // processes
        assert place["buffer_count"] == 8
    found = deepspeed_fitting.fitted(settings, small, 1, torch.bfloat16, choose=True)
    place = found["zero_optimization"]["offload_param"]
    assert (place["buffer_size"], place["buffer_count"]) == (1, 1)


def _json(tmp_path: Path, aio: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    weights = {"device": "nvme", "nvme_path": "/disk", "buffer_size": 600_000, "buffer_count": 8}
    zero = {
        "stage": 3, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0, "offload_param": weights,
    }  # fmt: skip
    zero |= {"offload_param": weights | more.pop("offload_param", {})} | more
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero, "aio": aio or {}}))
    return {"config": str(tmp_path / "ds.json")}


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "buffer_size is 1000, .* has 528384 elements .*; say 528384 at least": (
        "lora", {"offload_param": {"buffer_size": 1000}}),
    "of at most 300000 elements stay whole, such as .*; say fewer than 262144": (
        "lora", {"stage3_param_persistence_threshold": 300_000}),
    "offload_optimizer.buffer_count is 3, .*; say 4": (
        "lora", {"offload_optimizer": {"device": "nvme", "buffer_count": 3, "nvme_path": "/disk"}}),
    "put together at once, 16 of its parameters lie on nvme": (
        "full", {"offload_param": {"max_in_cpu": 0}}),
    "buffer_count is 8, and 9 parameters on nvme are needed together; say 9 at least": (
        "lora", {"stage3_max_reuse_distance": 1e9}),
    "needed twice within what DeepSpeed reads ahead": (
        "lora", {"stage3_prefetch_bucket_size": 2e3, "offload_param": {"buffer_count": 20}}),
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_a_json_with_which_deepspeed_would_stop_is_refused(
    said: str, keys: Keys, tmp_path: Path
) -> None:
    """Behaviour: one message with value, reason and fix. The next test plans the same without."""
    method, more = REFUSED[said]
    with pytest.raises(InputError, match=said):
        plan(lowres.load_recipe(keys(method, _json(tmp_path, **more))), devices.generic(8.0))


def test_what_is_small_for_the_disk_is_what_the_json_says(keys: Keys, tmp_path: Path) -> None:
    """Behaviour: of tensors below a block of reads nothing lies on the disk."""
    aio = {"block_size": 2 * 2**20, "queue_depth": 4}
    found = plan(lowres.load_recipe(keys("lora", _json(tmp_path, aio))), devices.generic(8.0))
    assert found.disk_bytes == 6 * _aligned(1032 * 512)


def _group(*sizes: int) -> list[dict[str, Any]]:
    return [{"params": [torch.empty(n, device="meta", requires_grad=True) for n in sizes]}]


def test_what_deepspeed_would_misread_is_refused() -> None:
    """Behaviour: a gradient of 1 MiB that begins within a sector, unless a sub-group does;
    smaller ones are not read."""
    settings = Zero(**BOTH)._settings()
    check = deepspeed_fitting.stop_at_misread
    for sizes, processes in (((2, 262_144), 1), ((262_146, 262_144), 1), ((130, 524_288), 2)):
        with pytest.raises(InputError, match="misreads them from nvme; use cpu"):
            check(settings, _group(*sizes), processes, torch.float32)
    check(settings, _group(128, 262_144, 2, 100_000), 1, torch.float32)
    zero = settings["zero_optimization"] | {"sub_group_size": 2}
    states = {"zero_optimization": {k: v for k, v in zero.items() if k != "offload_param"}}
    check(states, _group(2, 262_144), 1, torch.float32)


@pytest.mark.parametrize("stage", [1, 2])
def test_states_go_to_a_disk_at_stage_3_alone(stage: int, keys: Keys) -> None:
    """Behaviour: DeepSpeed would keep them in host memory and say nothing."""
    fields = {"stage": stage, "offload_optimizer": "nvme", "nvme_path": "/disk"}
    with pytest.raises(InputError, match=f"stage {stage} keeps what it offloads in host memory"):
        lowres.load_recipe(keys("lora", fields))
