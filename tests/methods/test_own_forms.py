"""What the methods with an own form of recomputing, sharing or scaling must do as any other does:
packed weights, checkpointed blocks, autocast, loading without memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowres.core.errors import LowresError
from lowres.making.build import Built, build
from tests.methods.adapted import adapted, llama, logits, moved

SETTINGS: dict[str, dict[str, Any]] = {
    "loretta_rep": {"rank": 4, "train_rank": 2},
    "loretta_adp": {"bottleneck": 8, "train_rank": 2},
    "lorta": {"rank": 4},
    "ssl": {},
    "ssb": {},
    "intrinsic_said": {"dimension": 100},
}
TINY = {"checkpoint": "package:lowres/assets/tiny_lm"}


@pytest.fixture(params=SETTINGS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def gradients(one: Any, built: Built) -> dict[str, torch.Tensor]:
    """Of a batch, with values other than those of the start."""
    moved(built.model)
    built.model.train()
    one.objective.loss(built.learner, built.collator(built.train_rows[:4])).backward()
    return {n: p.grad for n, p in built.model.named_parameters() if p.grad is not None}


def test_it_trains_around_packed_weights(method: str, recipe: Callable[..., Any]) -> None:
    """Behaviour: it starts as the packed base and each trained parameter has a finite gradient."""
    one = recipe(
        model=TINY, method={"name": method, **SETTINGS[method]}, levers=[{"name": "nf4_weights"}]
    )
    built = build(one)
    batch, model = built.collator(built.train_rows[:4]), built.model
    with torch.no_grad():
        start = built.learner.logits(batch)
        with model.disable_adapter():
            assert torch.equal(built.learner.logits(batch), start)
    found = gradients(one, built)
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.isfinite(g).all() and g.any() for g in found.values())


@pytest.mark.parametrize("lever", ["int8_weights", "nf4_weights"])
def test_plain_peft_merges_nothing_into_packed_weights(
    lever: str, method: str, recipe: Callable[..., Any]
) -> None:
    """Behaviour: what is no weight is not added to; the adapter answers as before."""
    model = build(recipe(model=TINY, method={"name": method, **SETTINGS[method]},
                         levers=[{"name": lever}])).model  # fmt: skip
    before = logits(moved(model).eval())
    with pytest.raises((LowresError, ValueError), match=r"quantised|cannot be merged"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)


def test_checkpointed_blocks_give_the_same_gradients(
    method: str, recipe: Callable[..., Any]
) -> None:
    """Reference: the gradients without the lever; what is computed twice is equal bit for bit, sums
    over layers that share a parameter are in the same order.
    """
    plain, again = (
        gradients(one, build(one))
        for one in (
            recipe(method={"name": method, **SETTINGS[method]}, levers=levers)
            for levers in ([], [{"name": "gradient_checkpointing"}])
        )
    )
    assert plain.keys() == again.keys() and plain
    assert all(torch.allclose(plain[n], again[n], rtol=1e-5, atol=1e-8) for n in plain)


def test_autocast_gives_close_logits_and_gradients_in_the_parameters_type(method: str) -> None:
    """Reference: float32; tolerance is 8 bits of mantissa through two blocks."""
    model = moved(adapted(llama(), method, **SETTINGS[method]))
    wide = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        made = model(input_ids=torch.arange(24).reshape(2, 12)).logits
    made.float().square().sum().backward()
    assert float((made.detach().float() - wide).norm() / wide.norm()) < 0.05
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained)


def test_a_base_in_16_bits_is_adapted_in_32(method: str) -> None:
    """Reference: the base in float32 with the same weights; as under autocast."""
    base = llama().bfloat16()
    model = moved(adapted(base, method, **SETTINGS[method]))
    narrow = model(input_ids=torch.arange(24).reshape(2, 12)).logits
    assert narrow.dtype == torch.bfloat16
    narrow.float().square().sum().backward()
    wide = moved(adapted(llama().bfloat16().float(), method, **SETTINGS[method]))
    values = dict(model.named_parameters())
    for name, parameter in wide.named_parameters():
        parameter.data = values[name].data.float()
    expected = logits(wide)
    assert float((narrow.detach().float() - expected).norm() / expected.norm()) < 0.05


def test_it_loads_without_taking_memory_twice(method: str, tmp_path: Path) -> None:
    """Reference: the adapter in memory, bit for bit; PEFT makes it on no device, then assigns."""
    from peft import PeftModel

    model = moved(adapted(llama(), method, **SETTINGS[method]))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path), low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_a_safe_merge_stops_at_what_is_not_finite() -> None:
    """Behaviour: as PEFT's own tuners; the weight is as it was."""
    model = moved(adapted(llama(), "krona"))
    name, layer = next((n, m) for n, m in model.named_modules() if hasattr(m, "deltas"))
    before = layer.get_base_layer().weight.detach().clone()
    trained = next(p for n, p in model.named_parameters() if p.requires_grad and name in n)
    trained.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
