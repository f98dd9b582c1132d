"""The table of what goes together: whole, as the page shows it, and made by runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.compatibility import PAGE, page
from lowres.core.compatibility import Combination, Table, told
from lowres.core.errors import LowresError
from lowres.core.reading import load_recipe
from lowres.run import compatibility


def test_no_cell_is_blank() -> None:
    """Behaviour: every method by weights, recomputation and engine; every pair of levers."""
    cells = Table.read().cells
    wanted = {one.key for one in compatibility.combinations()}
    assert wanted == set(cells), sorted(wanted ^ set(cells))[:5]
    assert all(c.reason for c in cells.values() if c.outcome != "works")
    assert any(c.outcome == "works" for c in cells.values())


def test_the_page_is_the_table() -> None:
    """Reference: what `python -m benchmarks.compatibility` writes."""
    assert PAGE.read_text(encoding="utf-8") == page(Table.read())


@pytest.mark.parametrize("key", ["lora", "full + nf4_weights"])
def test_a_cell_is_made_by_a_run(key: str, tmp_path: Path) -> None:
    """Reference: the table. One that works and one that is refused."""
    one = next(c for c in compatibility.combinations() if c.key == key)
    table = Table()
    compatibility.fill(table, [one], tmp_path, lambda _: None, lambda: None)
    assert table.cells[key].outcome == Table.read().cells[key].outcome, table.cells[key].reason


def test_what_hangs_or_crashes_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: the process is ended, and the table says so."""
    monkeypatch.setattr(compatibility, "SECONDS", 0)
    table = Table()
    compatibility.fill(table, [Combination("lora")], tmp_path, lambda _: None, lambda: None)
    assert table.cells["lora"].outcome == "fails" and table.cells["lora"].reason == "it hangs"


def test_files_that_differ_are_noticed(tmp_path: Path) -> None:
    """Behaviour: one bit is enough."""
    import torch
    from safetensors.torch import save_file

    from lowres.run.compatibility_cell import same_files

    for name, value in (("a", 1.0), ("b", 1.0), ("c", 1.0000001)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([value])}, tmp_path / name / "model.safetensors")
    same_files(tmp_path / "a", tmp_path / "b")
    with pytest.raises(LowresError, match="another w"):
        same_files(tmp_path / "a", tmp_path / "c")


def test_a_recipe_is_looked_up_whole_or_in_parts(raw_recipe: Any) -> None:
    """Behaviour: three levers are told by their pairs; what failed is said."""
    levers = ["nf4_weights", "gradient_checkpointing"]
    one = load_recipe(raw_recipe(method="lora", levers=levers))
    assert "run on cpu" in told(one, Table.read())
    table = Table(cells=dict(Table.read().cells))
    del table.cells["lora + nf4_weights + gradient_checkpointing"]
    assert "not in the" in told(one, table)
    table.cells["lora + nf4_weights"].outcome = "fails"
    table.cells["lora + nf4_weights"].reason = "for a reason"
    assert "fails: for a reason" in told(one, table)
