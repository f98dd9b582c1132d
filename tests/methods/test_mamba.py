"""Mamba's mixers, whose kernels read most weights instead of calling the layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowres.bridges.blocks import map_blocks
from lowres.core import registry
from lowres.core.errors import InputError

IDS = torch.arange(5, 25).view(2, 10)


def mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=8,
                    time_step_rank=4)
    )  # fmt: skip


def adapted(method: str, **fields: Any) -> Any:
    model = mamba()
    cls: Any = registry.load("method", method)
    return cls(**cls.sample_fields | fields).apply(model, map_blocks(model))


@pytest.mark.parametrize("method", ["lora", "krona", "loha", "ssb", "shira"])
def test_all_linear_is_what_is_called(method: str) -> None:
    """Behaviour: each trained tensor stands beside `in_proj` and gets a gradient."""
    model = adapted(method, targets="all-linear")
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".in_proj." in n for n in trained)
    assert all(p.grad is not None for p in trained.values())


def test_a_layer_whose_weight_is_read_is_refused_by_name() -> None:
    """Behaviour: with the reason, and what can be named; and no bias is left for bitfit."""
    with pytest.raises(InputError, match="'dt_proj' is read by a kernel.*there are in_proj"):
        adapted("lora", targets="in_proj+dt_proj")
    with pytest.raises(InputError, match="has no bias"):
        adapted("bitfit")
