"""AdamW with states in 8 bits, paged and not: bytes, updates beside AdamW, saving, refusing."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowres
from lowres.core import registry
from lowres.core.errors import InputError
from lowres.making.build import build
from tests.conftest import KINDS

NAMES = ("adamw_8bit", "paged_adamw_8bit")


@pytest.fixture(autouse=True)
def _paging_is_not_done_on_a_cpu() -> Iterator[None]:
    """bitsandbytes says so at each first update; a run is refused instead (tested below)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        yield


def make(name: str, parameters: Sequence[tuple[str, nn.Parameter]], **fields: Any) -> Any:
    return registry.load("optimizer", name)(**{"lr": 1e-2} | fields).make(parameters)


def updated(optimizer: Any, parameters: Sequence[nn.Parameter], steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


def state_bytes(optimizer: Any, parameter: nn.Parameter) -> int:
    """Of one parameter, without the two tables of 256 values that all of them share."""
    return sum(
        value.nbytes
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, torch.Tensor) and not key.startswith("qmap")
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(64, 64), (100, 41), (9001,), (4095,), (32, 8)])
def test_its_states_take_two_bytes_a_parameter_and_a_scale_a_block(
    shape: tuple[int, ...], name: str
) -> None:
    """Closed form: two states of n bytes, each with 4 bytes for each 256 elements begun; below
    4,096 elements two states in float32."""
    parameter = nn.Parameter(torch.ones(shape))
    optimizer = make(name, [("w", parameter)])
    updated(optimizer, [parameter], 1)
    n = parameter.numel()
    expected = 2 * 4 * n if n < 4096 else 2 * n + 2 * 4 * -(-n // 256)
    assert state_bytes(optimizer, parameter) == expected


@pytest.mark.parametrize("name", NAMES)
def test_all_parameters_share_the_tables_of_values(name: str) -> None:
    """Behaviour: 2 KiB in all, before and after a checkpoint was read."""
    pairs = [(f"w{i}", nn.Parameter(torch.ones(64, 64))) for i in range(3)]
    parameters = [p for _, p in pairs]
    optimizer = make(name, pairs)
    for _ in range(2):
        updated(optimizer, parameters, 1)
        tables = [optimizer.state[p][key] for p in parameters for key in ("qmap1", "qmap2")]
        assert len({t.untyped_storage().data_ptr() for t in tables}) == 2
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_it_follows_adamw_down_a_quadratic(name: str) -> None:
    """Reference: torch's AdamW, decay included, on an ill-conditioned quadratic. The states are
    rounded to 8 bits, with one scale for coordinates of very different curvature: the ends are 8 %
    of the way apart; twice that would be another rule."""
    torch.manual_seed(0)
    start, target = torch.randn(64, 128), torch.randn(64, 128)
    weight = torch.logspace(-1, 1, 128)
    ends = []
    for one in ("adamw", name):
        parameter = nn.Parameter(start.clone())
        optimizer = make(one, [("w", parameter)], weight_decay=0.1)
        for _ in range(60):
            (weight * (parameter - target) ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(parameter.detach())
    way = (ends[0] - start).norm()
    assert 0 < float((ends[1] - ends[0]).norm() / way) < 0.16


@pytest.mark.parametrize("name", NAMES)
def test_small_tensors_are_updated_as_by_adamw(name: str) -> None:
    """Reference: torch's AdamW; states in float32 in both. Tolerance: order of operations."""
    ends = []
    for one in ("adamw", name):
        parameter = nn.Parameter(torch.linspace(-1, 1, 300))
        updated(make(one, [("b", parameter)]), [parameter], 20)
        ends.append(parameter.detach())
    assert torch.allclose(*ends, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_embedding_tables_keep_32_bits_and_matrices_do_not(
    kind: str, recipe: Callable[..., Any]
) -> None:
    """Behaviour: found by name; checked against the modules of each kind of model."""
    made = recipe(
        kind, method="full", objective="label_words", optimizer={"name": "adamw_8bit", "lr": 1e-3}
    )
    built = build(made)
    tables = {
        id(p) for m in built.model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    groups = built.optimizer.param_groups
    bits = {id(p): group["optim_bits"] for group in groups for p in group["params"]}
    large = {id(p) for p in built.model.parameters() if p.numel() >= 4096}
    assert tables & large
    assert {bits[i] for i in tables & large} == {32}
    assert {bits[i] for i in bits.keys() - tables} == {8}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_goes_on_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """Reference: the optimizer that was not saved. Small, large and embedding parameters, through
    a file, as a checkpoint holds it."""

    def parameters() -> list[tuple[str, nn.Parameter]]:
        torch.manual_seed(1)
        shapes = {"model.embed_tokens.weight": (80, 64), "w": (80, 64), "b": (50,)}
        return [(n, nn.Parameter(torch.randn(s, dtype=dtype))) for n, s in shapes.items()]

    def step(optimizer: Any, pairs: list[tuple[str, nn.Parameter]], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _, p in pairs:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()

    one, two = parameters(), parameters()
    first, second = make(name, one), make(name, two)
    for seed in range(3):
        step(first, one, seed)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for (_, p), (_, q) in zip(one, two, strict=True):
        q.data.copy_(p.data)
    for seed in range(3, 6):
        step(first, one, seed)
        step(second, two, seed)
    for (n, p), (_, q) in zip(one, two, strict=True):
        assert torch.equal(p, q), n
        assert all(
            torch.equal(v, second.state[q][k])
            if isinstance(v, torch.Tensor)
            else v == second.state[q][k]
            for k, v in first.state[p].items()
        ), n


def test_exceptions_of_one_run_do_not_hold_for_the_next() -> None:
    """Behaviour: bitsandbytes keeps its own by the position of a parameter, for all optimizers."""
    import bitsandbytes

    table, matrix = nn.Parameter(torch.ones(80, 64)), nn.Parameter(torch.ones(80, 64))
    updated(make("adamw_8bit", [("wte.weight", table)]), [table], 1)
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    assert not manager.index2config and not manager.pid2config
    after = make("adamw_8bit", [("w", matrix)])
    updated(after, [matrix], 1)
    assert after.state[matrix]["state1"].dtype == torch.uint8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_paging_without_cuda_is_refused_and_named(
    recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: exit 2 with the choice that works, no quiet change of the optimizer."""
    one = recipe(method="lora", optimizer={"name": "paged_adamw_8bit", "lr": 1e-3})
    with pytest.raises(InputError, match=r"this run is on 'cpu'; use adamw_8bit"):
        lowres.run(one, output_folder=tmp_path / "out", quiet=True, plan=False)


def test_paged_states_are_planned_in_host_memory_and_over_the_bus(
    recipe: Callable[..., Any],
) -> None:
    """Closed form: of matrices from 100,000 elements two states of a byte an element, of embeddings
    of four bytes; beside the plan of the optimizer that does not page."""
    from lowres.making.build import build
    from lowres.memory import device
    from lowres.planning.plan import plan
    from lowres.planning.plan import with_budget as recipe_in

    tiny = {"checkpoint": "package:lowres/assets/tiny_lm"}
    make = lambda name: recipe(
        model=tiny, objective="label_words", optimizer={"name": name, "lr": 1e-3}
    )
    card = device.load("rtx-4090")
    plain, paged = (plan(make(name), card) for name in NAMES)
    large = {
        n: p for n, p in build(make(NAMES[0])).model.named_parameters() if p.numel() >= 100_000
    }
    assert {"embed" in name for name in large} == {True, False}
    moved = sum(2 * p.numel() * (4 if "embed" in n else 1) for n, p in large.items())
    kept, left = (one.phases["steady_steps"] for one in (plain, paged))
    states = kept.categories["optimizer states"] - left.categories["optimizer states"]
    assert states == pytest.approx(moved, rel=1e-3)
    assert left.host_bytes - kept.host_bytes == moved
    # They stay on a card with room for them; in less room each is gone before its next turn.
    assert plain.step.parts.get("transfers", 0.0) == paged.step.parts["transfers"] == 0
    for spare, times in ((-1, 2), (1, 0)):
        budget = (paged.needed_bytes + moved + spare * 2**21) / 2**30
        found = plan(recipe_in(make("paged_adamw_8bit"), budget), card)
        expected = times * moved / card.pcie_bytes_per_second
        assert found.fits and found.step.parts["transfers"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_cuda_large_states_are_paged_also_after_a_checkpoint() -> None:
    """Behaviour: they are outside the allocator, and stay there when they are read back."""
    parameter = nn.Parameter(torch.ones(1024, 1024, device="cuda"))
    optimizer = make("paged_adamw_8bit", [("w", parameter)])
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    again = make("paged_adamw_8bit", [("w", parameter)])
    again.load_state_dict(optimizer.state_dict())
    for one in (optimizer, again):
        assert all(one.state[parameter][key].is_paged for key in ("state1", "state2"))
        assert one.state[parameter]["absmax1"].is_cuda
    assert torch.equal(again.state[parameter]["state1"], optimizer.state[parameter]["state1"])
    before = parameter.detach().clone()
    again.step()
    assert not torch.equal(parameter, before)
