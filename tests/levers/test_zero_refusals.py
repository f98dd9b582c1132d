"""What `zero` refuses before anything is loaded, by its fields, JSON and stage, and the machine."""

from __future__ import annotations

import ctypes.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lowres
from lowres.bridges import deepspeed_disk
from lowres.core.errors import InputError

ZERO3 = {"name": "zero", "stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}


@pytest.mark.parametrize(
    ("lever", "said"),
    [
        ({"offload_parameters": "cpu"}, "use stage 3"),
        ({"whole_elements": 0}, "use stage 3"),
        ({"offload_optimizer": "nvme"}, "nvme_path"),
        ({"config": "x.json", "stage": 3}, "twice"),
    ],
)
def test_what_cannot_be_is_refused(
    lever: dict[str, Any], said: str, raw_recipe: Callable[..., dict[str, Any]]
) -> None:
    """Behaviour: before anything is loaded, with what to do."""
    keys = raw_recipe("encoder", method="lora", levers=[{"name": "zero", **lever}])
    with pytest.raises(InputError, match=said):
        lowres.load_recipe(keys)


def test_packed_weights_and_packed_states_are_refused(
    raw_recipe: Callable[..., dict[str, Any]],
) -> None:
    """Behaviour: stage 3 cannot divide what is packed, nor DeepSpeed move 8-bit states."""
    keys = raw_recipe(
        "decoder", method="lora", objective="label_words", levers=["nf4_weights", ZERO3],
        optimizer={"name": "adamw_8bit", "lr": 1e-3},
    )  # fmt: skip
    with pytest.raises(InputError) as refusal:
        lowres.load_recipe(keys)
    assert "use stage 2" in str(refusal.value) and "use adamw" in str(refusal.value)


def _problems(keys: dict[str, Any]) -> list[str]:
    with pytest.raises(InputError) as refusal:
        lowres.load_recipe(keys)
    return [problem.text for problem in refusal.value.problems]


CONTRADICTING: dict[str, tuple[dict[str, Any], str]] = {
    "optimizer": ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
                  "section 'optimizer', and the recipe's optimizer updates; take the section out"),
    "scheduler": ({"scheduler": {"type": "WarmupLR"}}, "section 'scheduler', and loop.schedule"),
    "bf16": ({"bf16": {"enabled": True}}, "bf16.enabled true, and loop.precision is 'no'; say"),
    "fp16": ({"fp16": {"enabled": True}}, "fp16.enabled true, and loop.precision is 'no'; say"),
    "autocast": ({"torch_autocast": {"enabled": True}}, "asks for 'torch_autocast'"),
    "rows in memory": ({"train_micro_batch_size_per_gpu": 3}, "loop.micro_batch_size is 4; say"),
    "rows": ({"train_batch_size": 16}, "train_batch_size 16, and loop.global_batch_size is 8; say"),
    "accumulation": ({"gradient_accumulation_steps": 4}, "makes 2; say"),
    "clipping": ({"gradient_clipping": 0.5}, "gradient_clipping 0.5, and loop.max_grad_norm is 1"),
    "auto": ({"zero_optimization": {"stage": 2, "sub_group_size": "auto"}},
             'zero_optimization.sub_group_size "auto", which nothing fills in; say a value'),
    "stage 0": ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage 0; say 1, 2 or 3"),
    "no stage": ({"zero_optimization": {}}, "zero_optimization.stage null; say 1, 2 or 3"),
    "stage 2.0": ({"zero_optimization": {"stage": 2.0}}, "zero_optimization.stage 2.0; say 1, 2"),
    "misspelt": ({"gradient_cliping": 0.1},
                 "'gradient_cliping', which is not handed on to DeepSpeed; did you mean 'gradient"),
    "unheard of": ({"progressive_layer_drop": {"enabled": True}},
                   "'progressive_layer_drop', which is not handed on to DeepSpeed; take it out"),
    "misspelt in zero": ({"zero_optimization": {"stage": 2, "overlap_com": True}},
                         "DeepSpeed does not know; did you mean 'overlap_comm'?"),
    "no section of its own": ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
                              'offload_optimizer "cpu", and DeepSpeed: Input should be a valid'),
    "place": ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpuu"}}},
              """offload_optimizer.device "cpuu", and DeepSpeed: Input should be 'none', 'cpu'"""),
    "rounding": ({"communication_data_type": "fp16"}, "sent in the type that they have; take it"),
    "predivision": ({"gradient_predivide_factor": 2.0}, "lowres divides the loss"),
    "another optimizer": ({"zero_force_ds_cpu_optimizer": True}, "the recipe's optimizer updates"),
    "quantised": ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "rounds"),
    "late": ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "updates late"),
    "no section": ({"zero_optimization": None}, "has no section zero_optimization"),
}  # fmt: skip
AGREEING: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4, "train_batch_size": 8, "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0, "bf16": {"enabled": False}, "zero_optimization": {"stage": 2},
    "zero_force_ds_cpu_optimizer": False, "curriculum_learning": {"enabled": False},
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTING)
def test_a_json_that_says_otherwise_is_refused(
    case: str, raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Behaviour: one problem, with key, reason and fix; what agrees is read."""
    changes, said = CONTRADICTING[case]
    path = tmp_path / "ds.json"
    keys = raw_recipe("encoder", method="lora", levers=[{"name": "zero", "config": str(path)}])
    path.write_text(json.dumps(AGREEING))
    lowres.load_recipe(keys)
    path.write_text(json.dumps(AGREEING | changes))
    (text,) = _problems(keys)
    assert said in text


def test_bf16_switched_off_in_the_json_is_refused(
    raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Behaviour: DeepSpeed would compute in float32, whatever the recipe says."""
    (tmp_path / "ds.json").write_text(json.dumps(AGREEING))
    lever = {"name": "zero", "config": str(tmp_path / "ds.json")}
    keys = raw_recipe("encoder", method="lora", levers=[lever], loop={"precision": "bf16"})
    (text,) = _problems(keys)
    assert "bf16.enabled false, and loop.precision is 'bf16'" in text


def test_accumulation_in_the_json_is_that_of_all_processes(
    raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed form: two processes of four rows make eight rows at once."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    lever = {"name": "zero", "config": str(tmp_path / "ds.json")}
    keys = raw_recipe("encoder", method="lora", levers=[lever])
    (tmp_path / "ds.json").write_text(json.dumps(AGREEING | {"gradient_accumulation_steps": 1}))
    lowres.load_recipe(keys)
    (tmp_path / "ds.json").write_text(json.dumps(AGREEING))
    (text,) = _problems(keys)
    assert "over 8 rows in memory" in text and "makes 1" in text


NEEDS = {
    "ninja": "with ninja, not found here: pip install ninja",
    "g++": "with g++, not found here: apt-get install g++",
    "libaio": "libaio is not there: apt-get install libaio-dev",
    "libaio.h": "without its header libaio.h, which DeepSpeed's asynchronous reader is built with: "
    "apt-get install libaio-dev",
}


@pytest.mark.parametrize("lacking", NEEDS)
def test_what_a_disk_needs_is_told_with_its_command(
    lacking: str, raw_recipe: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: each thing that may be missing, by itself."""
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == lacking else f"/bin/{tool}")
    there = None if lacking == "libaio" else "libaio.so.1"
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: there)
    monkeypatch.setattr(deepspeed_disk, "_has_header", lambda name: name != lacking)
    lever = ZERO3 | {"offload_optimizer": "nvme", "nvme_path": "/tmp"}
    (text,) = _problems(raw_recipe("encoder", method="lora", levers=[lever]))
    assert text.startswith("'zero': offloading to nvme: ") and NEEDS[lacking] in text


def test_with_all_of_it_there_is_nothing_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: the machine's own compiler is asked for headers."""
    monkeypatch.setattr(shutil, "which", lambda tool: f"/bin/{tool}")
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: "libaio.so.1")
    monkeypatch.setattr(deepspeed_disk, "_has_header", lambda name: True)
    assert deepspeed_disk.nvme_problem() is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_headers_are_found_where_the_compiler_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: among the system's, and where CFLAGS point."""
    assert deepspeed_disk._has_header("stdio.h") and not deepspeed_disk._has_header("of_lowres.h")
    (tmp_path / "of_lowres.h").touch()
    monkeypatch.setenv("CFLAGS", f"-I{tmp_path}")
    assert deepspeed_disk._has_header("of_lowres.h")


STAGE = [{"name": "zero", "stage": 1}, {"name": "zero"}, ZERO3]


@pytest.mark.parametrize("lever", STAGE, ids=["stage 1", "stage 2", "stage 3"])
@pytest.mark.parametrize("method", ["dora", "hira", "sara"])
def test_what_reads_whole_weights_is_refused_at_stage_3_alone(
    method: str, lever: dict[str, Any], raw_recipe: Callable[..., dict[str, Any]]
) -> None:
    """Behaviour: at stages 1 and 2 each process holds whole weights."""
    keys = raw_recipe("decoder", method=method, objective="label_words", levers=[lever])
    if lever is not ZERO3:
        lowres.load_recipe(keys)
        return
    (text,) = _problems(keys)
    assert "of which each process holds a part" in text and "stage 2" in text


def test_the_stage_may_stand_in_the_json(
    raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Behaviour: what a stage brings is that of the JSON."""
    path = tmp_path / "ds.json"
    keys = raw_recipe("encoder", method="hira", levers=[{"name": "zero", "config": str(path)}])
    path.write_text(json.dumps(AGREEING))
    lowres.load_recipe(keys)
    path.write_text(json.dumps(AGREEING | {"zero_optimization": {"stage": 3}}))
    (text,) = _problems(keys)
    assert "of which each process holds a part" in text


@pytest.mark.parametrize("lever", STAGE, ids=["stage 1", "stage 2", "stage 3"])
@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("adalora", "the gradients are gone when it is taken"),
        ("diff_pruning", "the next one would bring back what it pruned"),
    ],
)
def test_what_needs_gradients_or_sets_weights_is_refused_at_every_stage(
    method: str, why: str, lever: dict[str, Any], raw_recipe: Callable[..., dict[str, Any]]
) -> None:
    """Behaviour: DeepSpeed takes gradients away, and overwrites weights with its copies of them."""
    keys = raw_recipe("encoder", method=method, levers=[lever])
    (text,) = _problems(keys)
    assert why in text
