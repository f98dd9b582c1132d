"""Merging into weights and taking it away again, where the mathematics has a corner."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from lowres.bridges.peft_tuner import DeltaConfig
from lowres.core.errors import LowresError
from tests.methods.adapted import llama, opt

IDS = torch.arange(5, 25).view(2, 10)
BOFT = {"block_size": 4}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=IDS).logits
    return out


@pytest.mark.parametrize(
    ("method", "parameter", "zero"),
    [("ssb", "output", -1.0), ("ssl", "input", -1.0), ("attn_scale", "rows", -1.0),
     ("boft", "scale", 0.0)],
)  # fmt: skip
def test_a_factor_of_zero_is_not_unmerged(method: str, parameter: str, zero: float) -> None:
    """Behaviour: merged it is what it was; unmerging says that nothing gives the weights back, and
    writes no NaN."""
    model = peft.get_peft_model(
        opt(), DeltaConfig(method=method, settings=BOFT if method == "boft" else {})
    )
    last = [p for n, p in model.named_parameters() if n.endswith(f".{parameter}")][-1]
    with torch.no_grad():
        last[3] = zero
    before = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), before, atol=1e-5)
    with pytest.raises(LowresError, match="exactly 0"):
        model.unmerge_adapter()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("inner", ["bitfit", "attn_scale"])
@pytest.mark.parametrize("outer", ["boft", "ssb"])
def test_a_bias_moved_inside_of_a_scale_is_not_merged(inner: str, outer: str) -> None:
    """Behaviour: together they scale what the inner one adds to the bias, which no order of changes
    to the weights does; the other way around they merge to what they compute."""
    settings: dict[str, Any] = {"boft": BOFT, "ssb": {"targets": "all-linear"}}
    for names, merges in (((inner, outer), False), ((outer, inner), True)):
        model: Any = peft.get_peft_model(
            opt(),
            DeltaConfig(method=names[0], settings=settings.get(names[0], {})),
            adapter_name="A",
        )
        model.add_adapter("B", DeltaConfig(method=names[1], settings=settings.get(names[1], {})))
        draws = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lowres_delta_" in name:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=draws)
        model.base_model.set_adapter(["A", "B"])
        before = logits(model)
        if merges:
            model.merge_adapter(["A", "B"])
            assert torch.allclose(logits(model), before, atol=1e-5)
            continue
        with pytest.raises(LowresError, match="moves the bias"):
            model.merge_adapter(["A", "B"])
        assert torch.equal(logits(model), before)


def test_rotations_of_parameters_in_16_bits() -> None:
    """Reference: the same parameters in float32; to bfloat16's rounding."""
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = peft.get_peft_model(llama(), DeltaConfig(method="boft", settings=BOFT))
        draws = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lowres_delta_" in name:
                noise = 0.05 * torch.randn(parameter.shape, generator=draws)
                parameter.data = (parameter.data + noise).to(torch.bfloat16).to(dtype)
        made.append(logits(model))
    assert (made[1] - made[0]).norm() <= 0.02 * made[0].norm()
    assert not torch.equal(made[1], made[0])
