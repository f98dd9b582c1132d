"""Optimizer states in host memory: planned for a GPU, computed as without, saved, refused.

On a CPU host and device are the same memory, and the same copies are made and counted apart.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowres
from lowres.core.errors import InputError, LowresError
from lowres.levers._host_optimizer import HostOptimizer
from tests.conftest import sampled

LEVER = [{"name": "optimizer_offload"}]


@pytest.mark.parametrize(
    ("lever", "method"),
    [({}, "full"), ({"float32_master": True}, "full"), ({}, "krona_res")],
)
def test_planned_bytes_are_measured_bytes(
    lever: dict[str, Any], method: str, recipe: Callable[..., Any], in_folder: Path
) -> None:
    """Reference: real runs on the CPU that copy as beside a GPU; both memories are counted. One
    method trains numbers that are no tensors of any size (krona_res)."""
    dtype = "bfloat16" if lever else "float32"
    one = recipe(levers=[LEVER[0] | lever], model={"dtype": dtype}, method=method)
    record = lowres.run(one, quiet=True)
    assert record.plan is not None, record.events
    for phase in ("first_step", "steady_steps", "evaluate"):
        planned = record.plan["phases"][phase]["live_bytes"]
        assert planned == record.measured.phases[phase].live_bytes, phase  # type: ignore[index]


@pytest.mark.parametrize(
    ("implementation", "in_backward"), sampled(["fused", "foreach", "loop"], [False, True], every=2)
)
def test_the_copies_change_no_bit(
    in_backward: bool, implementation: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Reference: the run without the lever; parameters, gradients and states are only moved."""
    optimizer = {"name": "adamw", "lr": 1e-2, "implementation": implementation}
    changes: dict[str, Any] = {"optimizer": optimizer}
    if in_backward:
        changes["loop"] = {"micro_batch_size": 8, "max_grad_norm": None}
    levers = [{"name": "optimizer_in_backward"}] if in_backward else []
    plain = lowres.run(recipe(**changes), output_folder=tmp_path / "a", quiet=True, plan=False)
    moved = lowres.run(
        recipe(levers=levers + LEVER, **changes),
        output_folder=tmp_path / "b",
        quiet=True,
        plan=False,
    )
    assert moved.losses == plain.losses


def quadratic(dtype: torch.dtype, **fields: Any) -> tuple[nn.Parameter, HostOptimizer]:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(16, 8).to(dtype))
    inner = torch.optim.AdamW([parameter], lr=1e-3, fused=True)
    return parameter, HostOptimizer(inner, **{"float32_master": False} | fields)


def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad()


def test_a_master_copy_is_the_run_in_float32() -> None:
    """Reference: AdamW over a float32 parameter with the same gradients; steps of 1e-3 are lost in
    bfloat16."""
    reference = nn.Parameter(quadratic(torch.bfloat16)[0].detach().float())
    plain = torch.optim.AdamW([reference], lr=1e-3, fused=True)
    parameter, optimizer = quadratic(torch.bfloat16, float32_master=True)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        given = torch.randn(parameter.shape, generator=generator).bfloat16()
        parameter.grad, reference.grad = given.clone(), given.float()
        optimizer.step()
        plain.step()
    assert torch.equal(optimizer.state[parameter]["master"], reference)
    assert torch.equal(parameter, reference.bfloat16())


@pytest.mark.parametrize("master", [False, True])
def test_saved_and_loaded_it_goes_on_bit_for_bit(master: bool) -> None:
    """Reference: the optimizer that was not saved; through a file, with states wider than their
    parameter."""
    (one, first), (two, second) = (quadratic(torch.bfloat16, float32_master=master) for _ in "ab")
    for seed in range(3):
        step(one, first, seed)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    two.data.copy_(one.data)
    for seed in range(3, 6):
        step(one, first, seed)
        step(two, second, seed)
    assert torch.equal(one, two)
    for key, value in first.state[one].items():
        assert value.dtype == second.state[two][key].dtype
        assert torch.equal(value, second.state[two][key]), key
    assert ("master" in first.state[one]) == master


def test_a_resumed_run_is_the_uninterrupted_one(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Reference: the uninterrupted run, bit for bit, through accelerate's checkpoint."""
    make = lambda **budget: recipe(
        levers=[LEVER[0] | {"float32_master": True}], budget=budget, model={"dtype": "bfloat16"},
        loop={"save_every": 2},
    )  # fmt: skip
    whole = lowres.run(make(), output_folder=tmp_path / "a", quiet=True, plan=False)
    with pytest.raises(LowresError):
        lowres.run(make(minutes=1e-6), output_folder=tmp_path / "b", quiet=True, plan=False)
    again = lowres.run(
        make(), output_folder=tmp_path / "b", resume="latest", quiet=True, plan=False
    )
    assert again.losses == whole.losses


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [("adamw_8bit", "8 bits .* use adamw"), ("paged_adamw_8bit", "by itself, a page at a time")],
)
def test_states_with_a_place_of_their_own_are_refused(
    optimizer: str, said: str, recipe: Callable[..., Any]
) -> None:
    """Behaviour: the reason and the choice that works."""
    with pytest.raises(InputError, match=said):
        recipe(levers=LEVER, optimizer={"name": optimizer, "lr": 1e-3})


def test_a_master_copy_of_float32_is_refused(recipe: Callable[..., Any]) -> None:
    """Behaviour: it would be the same numbers twice."""
    with pytest.raises(InputError, match="set float32_master to false"):
        recipe(levers=[LEVER[0] | {"float32_master": True}])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("master", [False, True])
def test_on_cuda_the_device_holds_no_states(master: bool) -> None:
    """Closed form: the device's allocated bytes are those of the parameter, before and after."""
    parameter = nn.Parameter(torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16))
    inner = torch.optim.AdamW([parameter], lr=1e-3, fused=True)
    optimizer = HostOptimizer(inner, float32_master=master)
    before, start = torch.cuda.memory_allocated(), parameter.detach().clone()
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    assert not torch.equal(parameter, start)
    del start
    assert torch.cuda.memory_allocated() == before
    assert all(v.device.type == "cpu" for v in optimizer.state[parameter].values())
    assert parameter.is_cuda
