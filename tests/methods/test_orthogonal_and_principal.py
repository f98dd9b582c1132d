"""Butterfly rotations and principal parts: dense matrices in float64, and PEFT's own forms."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer
from torch import nn

from lowres.core.errors import InputError
from lowres.methods._butterfly import ButterflyDelta
from tests.methods.test_of_peft import LAYERS, QV, D, adapt, llama, logits, method, train, trained

QUERIES = "q_proj+v_proj"


def deltas(model: nn.Module) -> list[Any]:
    found = [m for m in model.modules() if type(m).__name__.endswith("Delta")]
    assert len(found) == LAYERS * len(QV)
    return found


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_the_rotation_is_the_product_of_dense_butterfly_factors(factors: int) -> None:
    """Dense reconstruction in float64, with PEFT's permutations; and it is orthogonal."""
    n, b = 32, 4
    torch.manual_seed(0)
    delta = ButterflyDelta(nn.Linear(n, 8), {"block_size": b, "factors": factors}).double()
    nn.init.normal_(delta.skew)
    dense = torch.eye(n, dtype=torch.float64)
    for level, blocks in enumerate(delta._orthogonal()):
        permute: Any = BOFTLayer.block_butterfly_perm
        order = permute(None, n, n // b // 2**level, b // 2, factors - 1)
        p = torch.zeros(n, n, dtype=torch.float64)
        p[torch.arange(n), order] = 1
        dense = p @ torch.block_diag(*blocks) @ p.T @ dense
    x = torch.randn(3, 5, n, dtype=torch.float64)
    torch.testing.assert_close(delta.rotate(x), x @ dense, atol=1e-12, rtol=0)
    torch.testing.assert_close(delta.rotate(delta.rotate(x), back=True), x, atol=1e-12, rtol=0)
    torch.testing.assert_close(dense @ dense.T, torch.eye(n).double(), atol=1e-12, rtol=0)
    # Features ever farther apart meet.
    assert int((dense.abs() > 1e-9).sum(1).max()) == b * 2 ** (factors - 1)


def test_with_one_factor_it_is_peft_s() -> None:
    """Reference: PEFT's layer with the same skew-symmetric parts. Tolerance: float32 rounding."""
    ours = adapt(llama(), method("boft", factors=1, targets=QUERIES))
    config = peft.BOFTConfig(
        boft_block_size=8, boft_n_butterfly_factor=1, target_modules=["q_proj", "v_proj"]
    )
    theirs = peft.get_peft_model(llama(), config).eval()
    layers = [m for m in theirs.modules() if isinstance(m, BOFTLayer)]
    torch.manual_seed(1)
    for delta, layer in zip(deltas(ours), layers, strict=True):
        nn.init.normal_(delta.skew, std=0.3)
        nn.init.uniform_(delta.scale, 0.5, 2.0)
        rows, columns = torch.triu_indices(8, 8, 1)
        whole = torch.zeros(1, D // 8, 8, 8)
        # PEFT takes half the difference from the transpose.
        whole[:, :, rows, columns] = 2 * delta.skew.data
        layer.boft_R["default"].data.copy_(whole)
        layer.boft_s["default"].data.copy_(delta.scale.data[:, None])
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(ours), logits(llama()), atol=1e-2)


@pytest.mark.parametrize(("block", "factors"), [(4, 3), (8, 2), (8, 1)])
def test_butterflies_have_the_parameters_of_the_closed_form(block: int, factors: int) -> None:
    """Closed form: M (i / b) b (b - 1) / 2 + o for each layer."""
    one = method("boft", block_size=block, factors=factors, targets=QUERIES)
    counted = sum(p.numel() for p in trained(adapt(llama(), one)).values())
    each = [factors * (i // block) * (block * (block - 1) // 2) + o for i, o in QV.values()]
    assert counted == LAYERS * sum(each)


def test_merging_butterflies_can_be_undone() -> None:
    """Reference: the weights before. Tolerance: float32 rounding."""
    model = adapt(llama(), method("boft", targets=QUERIES))
    before = {n: p.clone() for n, p in model.named_parameters()}
    train(model)
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if "base_layer" in name:
            torch.testing.assert_close(parameter, before[name], atol=1e-6, rtol=0)


def test_pissa_learns_as_peft_s_does_beside_the_rest_of_the_weight() -> None:
    """Reference: PEFT's, which changes the weights. Tolerance: float32 rounding over 3 updates."""
    ours = adapt(llama(), method("pissa", rank=4, iterations=0, targets=QUERIES))
    assert torch.equal(logits(ours), logits(llama()))
    config = peft.LoraConfig(
        r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"]
    )
    theirs = peft.get_peft_model(llama(), config).eval()
    for model in (ours, theirs):
        train(model)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(logits(ours), logits(llama()), atol=1e-2)


def test_pissa_starts_at_the_largest_singular_values() -> None:
    """Closed form: what it leaves of a weight has the other singular values; the trained
    parameters are r (i + o) a layer.
    """
    rank = 3
    model = adapt(llama(), method("pissa", rank=rank, iterations=0, targets=QUERIES))
    counted = sum(p.numel() for p in trained(model).values())
    assert counted == LAYERS * sum(rank * (i + o) for i, o in QV.values())
    for layer in (m for m in model.modules() if hasattr(m, "lowres_delta_parts")):
        (delta,) = layer.deltas("default")
        weight = layer.base_layer.weight.detach()
        rest = torch.linalg.svdvals(weight - (delta.up @ delta.down).detach())
        expected = torch.linalg.svdvals(weight)[rank:]
        torch.testing.assert_close(rest[: len(expected)], expected, atol=1e-6, rtol=1e-4)


def test_pissa_with_iterations_comes_near_the_exact_decomposition() -> None:
    """Reference: the exact one, which leaves the least of a weight that rank allows."""
    model = adapt(llama(), method("pissa", rank=4, iterations=16, targets=QUERIES))
    for layer in (m for m in model.modules() if hasattr(m, "lowres_delta_parts")):
        (delta,) = layer.deltas("default")
        weight = layer.base_layer.weight.detach()
        least = torch.linalg.svdvals(weight)[4:].norm()
        assert least <= (weight - (delta.up @ delta.down).detach()).norm() < 1.01 * least


def test_pissa_refuses_more_singular_values_than_there_are() -> None:
    """Behaviour."""
    with pytest.raises(InputError, match="more than its 8 singular values"):
        adapt(llama(), method("pissa", rank=9))
