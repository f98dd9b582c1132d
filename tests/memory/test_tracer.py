"""What a trace records, rule by rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowres.memory.trace import Birth, Trace
from lowres.memory.tracer import TraceFailed, Tracer
from lowres.memory.translate import Target, translating

CUDA = Target("cuda")


def births(tracer: Tracer, stage: str) -> list[int]:
    return [b.bytes for b in tracer.trace.births if b.stage == stage]


def alive(tracer: Tracer) -> int:
    return sum(tracer.trace.sizes)


def test_floats_take_no_memory_and_integers_keep_their_values() -> None:
    """Behaviour: a tensor of a tebibyte is only counted; a mask of ids can be looked at."""
    tracer = Tracer()
    with tracer:
        huge = torch.zeros(1 << 38)
        ids = torch.tensor([3, 0, 3])
        where = (ids == 3).nonzero()
    assert where[:, 0].tolist() == [0, 2]
    assert alive(tracer) >= 1 << 40
    del huge
    assert alive(tracer) < 1 << 20


def test_a_view_is_no_birth_and_a_death_is_the_last_reference() -> None:
    """Closed form: 4,000 bytes once, gone with the view."""
    tracer = Tracer()
    with tracer:
        whole = torch.empty(1000)
        view = whole.view(10, 100).t()
        del whole
        assert alive(tracer) == 4000
        del view
    assert alive(tracer) == 0
    assert tracer.trace.sizes == [4000, -4000]


def test_numbers_that_do_not_exist_have_stated_values() -> None:
    """Behaviour: 1 for a number, False for a truth value, positions spread around the middle."""
    tracer = Tracer()
    with tracer:
        x = torch.randn(4, 8)
        assert float(x.sum()) == 1.0
        assert not bool(torch.isnan(x).any())
        routes = x.topk(2).indices
    counts = torch.bincount(routes.flatten(), minlength=8)
    assert counts.tolist() == [1] * 8, "every expert gets as many rows"


def test_a_choice_by_float_values_is_refused_by_name() -> None:
    """Behaviour: how many rows a fake mask chooses is not made up."""
    tracer = Tracer()
    with tracer, pytest.raises(TraceFailed, match="nonzero|index"):
        x = torch.randn(4, 8)
        x[x > 0]


def attention(target: Target, **kinds: Any) -> Tracer:
    tracer = Tracer()
    with tracer, translating(tracer, target):
        q = torch.empty(2, 8, 256, 64, dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.empty(2, 2, 256, 64, dtype=torch.bfloat16, requires_grad=True) for _ in "kv")
        tracer.enter("forward")
        if "mask" in kinds:
            k, v = (t.repeat_interleave(4, 1) for t in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, kinds["mask"])
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        loss = out.float().sum()
        tracer.enter("backward")
        loss.backward()
    return tracer


def test_flash_attention_keeps_a_row_of_sums_and_borrows_an_accumulator() -> None:
    """Closed form: B H T floats kept; backward B T H D floats, and a gradient for each head."""
    tracer = attention(CUDA)
    out = 2 * 8 * 256 * 64 * 2
    assert births(tracer, "forward")[:2] == [out, 2 * 8 * 256 * 4]
    back = births(tracer, "backward")
    assert 2 * 256 * 8 * 64 * 4 in back
    assert back.count(out) >= 3, "dq, and dk and dv for every query head"
    assert max(back) < 2 * 8 * 256 * 256 * 2, "no (T, T) matrix"


def test_before_ampere_groups_of_heads_are_written_out() -> None:
    """Reference: torch's plain kernel on a CPU, in float32 as on CUDA: without flash no fused one
    takes groups, so scores of (T, T) are kept."""
    tracer = attention(Target("cuda", flash=False))
    scores = 2 * 8 * 256 * 256 * 4
    assert births(tracer, "forward").count(scores) >= 2
    usual = Tracer()
    with usual, sdpa_kernel(SDPBackend.MATH):
        q = torch.empty(2, 8, 256, 64, dtype=torch.bfloat16, requires_grad=True)
        k = torch.empty(2, 2, 256, 64, dtype=torch.bfloat16, requires_grad=True)
        usual.enter("forward")
        out = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    assert births(usual, "forward").count(scores) >= 2 and out.dtype == q.dtype


@pytest.mark.parametrize(
    "old, as_float16, autocast, out",
    [(True, False, None, True), (True, False, torch.bfloat16, True),
     (True, True, torch.bfloat16, False), (False, False, None, False)],
)  # fmt: skip
def test_before_ampere_no_fused_kernel_takes_bfloat16(
    old: bool, as_float16: bool, autocast: torch.dtype | None, out: bool
) -> None:
    """Behaviour: also with a mask, and under autocast; float16, for which autocast to bfloat16 may
    stand, has the memory-efficient one."""
    tracer = Tracer()
    target = Target("cuda", flash=not old, as_float16=as_float16)
    kind = torch.float32 if autocast else torch.bfloat16
    mask = torch.ones(2, 1, 256, 256, dtype=torch.bool)
    with tracer, translating(tracer, target), torch.autocast("cpu", autocast, autocast is not None):
        q = torch.empty(2, 8, 256, 64, dtype=kind, requires_grad=True)
        tracer.enter("forward")
        F.scaled_dot_product_attention(q, q, q, mask)
    assert (2 * 8 * 256 * 256 * 4 in births(tracer, "forward")) == out


def test_a_mask_becomes_a_bias_of_its_own_in_every_layer() -> None:
    """Closed form: B T T values of the computing type."""
    mask = torch.ones(2, 1, 256, 256, dtype=torch.bool)
    assert 2 * 256 * 256 * 2 in births(attention(CUDA, mask=mask), "forward")


def test_dropout_keeps_one_byte_an_element() -> None:
    """Closed form: on CUDA a mask of bytes, on the CPU one of the input's type."""
    for target, mask in ((CUDA, 1000), (Target("cpu"), 4000)):
        tracer = Tracer()
        with tracer, translating(tracer, target):
            x = torch.empty(1000, requires_grad=True)
            kept = F.dropout(x, 0.5)
        assert alive(tracer) == 4000 + 4000 + mask
        del kept, x


def test_products_take_a_workspace_in_each_thread_once() -> None:
    """Closed form: two cuBLAS handles, one of the backward thread."""
    tracer = Tracer()
    with tracer, translating(tracer, CUDA):
        w = torch.empty(64, 64, requires_grad=True)
        for _ in range(2):
            tracer.enter("forward")
            loss = (torch.empty(8, 64) @ w).sum()
            tracer.enter("backward")
            loss.backward()
    kept = [b for b in tracer.trace.births if b.category == "workspaces"]
    assert [b.bytes for b in kept] == [8_519_680] * 2


def test_deaths_that_nothing_separates_are_put_in_order() -> None:
    """Behaviour: by block and birth, and never across a birth or a phase's border."""
    trace = Trace(births=[Birth(8, p, "forward", "", "", 0) for p in (1, 0, 1, 0)])
    trace.tensors = [0, 1, 2, 3, 2, 1, 0, 3]
    trace.sizes = [8, 8, 8, 8, -8, -8, -8, -8]
    trace.places = [1, 0, 1, 0, 1, 0, 1, 0]
    trace.loose = [4, 5, 6, 7]
    trace.marks = [("border", 7)]
    trace.settle()
    assert trace.tensors == [0, 1, 2, 3, 1, 0, 2, 3]


def test_a_copy_of_a_fake_tensor_is_of_the_same_mode() -> None:
    """Behaviour: a copied mode would release storages twice, and crash in a later collection."""
    tracer = Tracer()
    with tracer:
        states = {"state1": torch.zeros(8, 8)}
        copied = copy.deepcopy(states)
    assert copied["state1"] is not states["state1"]
    assert copied["state1"].fake_mode is states["state1"].fake_mode  # type: ignore[attr-defined]
