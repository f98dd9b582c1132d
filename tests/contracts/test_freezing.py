"""What every freezing promises, without naming one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowres.core import registry
from lowres.run.build import build
from tests.conftest import KINDS, sample_part

FREEZING = registry.names("freezing")
METHODS = registry.names("method")


def test_there_are_freezings() -> None:
    """Behaviour: the listing is not empty."""
    assert len(FREEZING) >= 2


def saved_bytes_below(built: Any, batch: Any, objective: Any) -> dict[str, int]:
    """Bytes that autograd keeps in each block and the stem during one forward pass."""
    learner, kept, here = built.learner, {}, []
    own = {p.untyped_storage().data_ptr() for p in built.model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own and here:
            kept[here[-1]] = kept.get(here[-1], 0) + tensor.nbytes
        return tensor

    handles = []
    places = [*learner.blocks.names, *learner.blocks.stem]
    for path, module in built.model.named_modules():
        plain = path.replace("base_model.model.", "", 1)
        if plain in places:
            handles.append(module.register_forward_pre_hook(lambda *_, p=plain: here.append(p)))
            handles.append(module.register_forward_hook(lambda *_: (here.pop(), None)[1]))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        objective.loss(learner, batch)
    for handle in handles:
        handle.remove()
    return kept


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("freezing", FREEZING)
def test_nothing_is_kept_for_backward_below_the_lowest_trained_block(
    freezing: str, method: str, kind: str, recipe: Callable[..., Any]
) -> None:
    """Behaviour: no gradient and no saved tensor in the blocks and the stem below."""
    one = recipe(
        kind, freezing=sample_part("freezing", freezing), method=sample_part("method", method)
    )
    built = build(one)
    blocks = built.learner.blocks
    batch = built.collator(built.train_rows[:4])
    built.model.train()
    one.objective.loss(built.learner, batch).backward()
    for name, parameter in built.model.named_parameters():
        plain = name.replace("base_model.model.", "", 1)
        if not blocks.trains(plain.replace(".base_layer", "")):
            assert parameter.grad is None, name
    lowest = next((i for i, n in enumerate(blocks.names) if n in blocks.trained), len(blocks.names))
    kept = saved_bytes_below(built, batch, one.objective)
    if not blocks.train_stem:
        below = [*blocks.names[:lowest], *blocks.stem]
        assert [n for n in below if kept.get(n)] == []
    assert any(kept.get(n) for n in blocks.names[lowest:]), "the probe saw nothing at all"


@pytest.mark.parametrize("freezing", FREEZING)
def test_frozen_blocks_do_not_move(freezing: str, recipe: Callable[..., Any]) -> None:
    """Behaviour, with the method that would train everything it may."""
    one = recipe("encoder", freezing=sample_part("freezing", freezing), method="full")
    built = build(one)
    blocks = built.learner.blocks
    before = {n: p.detach().clone() for n, p in built.model.named_parameters()}
    one.objective.loss(built.learner, built.collator(built.train_rows[:4])).backward()
    built.optimizer.step()
    moved = {n for n, p in built.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(blocks.trains(n) for n in moved)
