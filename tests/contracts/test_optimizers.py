"""What every optimizer promises, without naming one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowres.core import registry
from tests.conftest import ROOT, sample_part

OPTIMIZERS = registry.names("optimizer")


def test_there_are_optimizers() -> None:
    """Reference: the files of the folder."""
    files = (ROOT / "lowres" / "optimizers").glob("[!_]*.py")
    assert OPTIMIZERS and OPTIMIZERS == sorted(file.stem for file in files)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_descends_a_quadratic(name: str) -> None:
    """Behaviour: half the distance to the minimum within 400 updates."""
    fields = sample_part("optimizer", name)
    del fields["name"]
    parameter = nn.Parameter(torch.full((4, 3), 0.2))
    optimizer = registry.load("optimizer", name)(**fields).make([("w", parameter)])
    for _ in range(400):
        (parameter**2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(parameter.detach().abs().max()) < 0.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_takes_every_parameter_once(name: str) -> None:
    """Behaviour: vectors and matrices, none twice, none left."""
    fields = sample_part("optimizer", name)
    del fields["name"]
    given = [("w", nn.Parameter(torch.ones(3, 2))), ("b", nn.Parameter(torch.ones(3)))]
    optimizer = registry.load("optimizer", name)(**fields).make(given)
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for _, p in given)
