"""The table of what goes together: whole, as the page shows it, and made by runs."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from lowres.bench import compatibility
from lowres.core import registry
from lowres.core.compatibility import Cell, Combination, Table, told
from lowres.core.errors import InputError, LowresError
from lowres.core.reading import load_recipe
from lowres.recommend.nearest import nearest


def test_no_cell_is_blank() -> None:
    """Behaviour: every method by weights, recomputation and engine; every pair of levers."""
    cells = Table.read().cells
    wanted = {one.key for one in compatibility.combinations()}
    assert wanted == set(cells), sorted(wanted ^ set(cells))[:5]
    assert all(c.reason for c in cells.values() if c.outcome != "works")
    assert any(c.outcome == "works" for c in cells.values())


@pytest.mark.parametrize("name", registry.names("lever"))
def test_a_lever_says_which_of_its_forms_it_has(name: str) -> None:
    """Behaviour: with the fields of a form, its name in the table; else its own."""
    cls: Any = registry.load("lever", name)
    assert cls(**cls.sample_fields).form() == name
    told = compatibility.forms()
    assert name in told and set(cls.forms) <= told.keys()
    for form, fields in cls.forms.items():
        assert cls(**fields).form() == form != name


@pytest.mark.parametrize(
    "key",
    ["lora", "full + nf4_weights", "bitfit", "dora + zero stage 3",
     *(pytest.param(f"{method} + zero stage 3", marks=pytest.mark.slow)
       for method in ("bitfit", "lora_fa", "prompt_tuning"))],
)  # fmt: skip
def test_a_cell_is_made_by_a_run(key: str, in_folder: Path) -> None:
    """Reference: the table. One that works, one that is refused, one of the second model, one of a
    form of a lever, one of both, one that saves frozen tensors, one that saves prompts which it
    makes anew; in a relative folder."""
    one = next(c for c in compatibility.combinations() if c.key == key)
    table = Table()
    compatibility.fill(table, [one], Path("cells"), lambda _: None, lambda: None)
    assert table.cells[key].outcome == Table.read().cells[key].outcome, table.cells[key].reason


def test_what_hangs_or_crashes_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: the process is ended, and the table says so."""
    monkeypatch.setattr(compatibility, "SECONDS", 0)
    table = Table()
    compatibility.fill(table, [Combination("lora")], tmp_path, lambda _: None, lambda: None)
    assert table.cells["lora"].outcome == "fails" and table.cells["lora"].reason == "it hangs"


def test_a_process_that_dies_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: its code is told, and no other model is tried."""
    monkeypatch.setattr(compatibility, "_tried", lambda *_: os._exit(7))
    cell, elsewhere = compatibility._apart(Combination("lora"), "any", tmp_path)
    assert (cell.outcome, cell.reason) == ("fails", "the process ended with code 7")
    assert not elsewhere


def test_a_forked_process_begins_with_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: before its work, which loads weights in several threads at once: those would find
    no pool of torch's now and then."""
    import torch

    from lowres.bench import compatibility_cell

    said: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", said.append)
    tell = lambda *_: (Cell("works", str(said), "any", 0.0), False)
    monkeypatch.setattr(compatibility, "_tried", tell)
    cell, _ = compatibility._apart(Combination("lora"), "any", tmp_path)
    assert cell.reason == "[1]"

    def work() -> None:
        raise LowresError(str(said))

    with pytest.raises(LowresError, match=r"\[1\]"):
        compatibility_cell._later(work)()
    assert not said  # here


def test_files_that_differ_are_noticed(tmp_path: Path) -> None:
    """Behaviour: one bit is enough."""
    import torch
    from safetensors.torch import save_file

    from lowres.bench.compatibility_cell import same_files

    for name, value in (("a", 1.0), ("b", 1.0), ("c", 1.0000001)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([value])}, tmp_path / name / "model.safetensors")
    same_files(tmp_path / "a", tmp_path / "b")
    with pytest.raises(LowresError, match="another w"):
        same_files(tmp_path / "a", tmp_path / "c")


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a cell looks at after its first run: recipe, inputs, folder, batch, logits."""
    from lowres.making import build
    from lowres.run import merging
    from lowres.run.execute import execute

    folder = tmp_path_factory.mktemp("cell")
    one = load_recipe(compatibility.raw(Combination("lora"), compatibility.MODELS[0], folder))
    inputs = build.read(one)
    batch = build.collator(one, inputs)(inputs.data.train[: merging.ROWS])
    logits: list[Any] = []

    def look(learner: Any) -> None:
        logits.append(merging.logits_of(learner, batch))

    execute(one, output_folder=folder / "whole", quiet=True, look=look)
    return one, inputs, folder / "whole" / "model", batch, logits[0]


def _another_value(weights: dict[str, Any]) -> None:
    """As if one matrix had not been written as it was: off by a thousandth."""
    key = next(k for k in weights if k.endswith(("lora_B.weight", "q_proj.weight")))
    weights[key] = weights[key] * 1.001 + 1e-3


def _rewrite(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    _another_value(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("broken", ["nothing", "reload", "no adapter", "merge", "merged file"])
def test_a_broken_reload_or_merge_is_noticed(
    broken: str, tried: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: a file with another value, an adapter that is not put in, a merge that folds
    nothing in, a merged file with another value; and what is whole goes through."""
    import shutil

    from lowres.bench.compatibility_cell import same_answers
    from lowres.bridges import peft, transformers

    one, inputs, model, batch, trained = tried
    saved = tmp_path / "model"
    shutil.copytree(model, saved)
    said = {"reload": "saved model", "no adapter": "saved model", "merged file": "merged model, lo"}
    if broken == "reload":
        _rewrite(saved / "adapter_model.safetensors")
    elif broken == "no adapter":
        monkeypatch.setattr(peft, "load_adapter", lambda model, _: model)
    elif broken == "merge":
        monkeypatch.setattr(type(one.method), "merge", lambda _, model: model.unload())
    elif broken == "merged file":
        usual = transformers.save

        def save(learned: Any, tokenizer: Any, folder: Path) -> None:
            usual(learned, tokenizer, folder)
            _rewrite(folder / "model.safetensors")

        monkeypatch.setattr(transformers, "save", save)
    if broken == "nothing":
        same_answers(one, inputs, saved, batch, trained)
        return
    with pytest.raises(LowresError, match=said.get(broken, "off by")):
        same_answers(one, inputs, saved, batch, trained)


def test_a_whole_model_that_is_not_the_trained_one_is_noticed(tried: Any, tmp_path: Path) -> None:
    """Behaviour: the base's own weights in place of what full training saved."""
    from lowres.bench.compatibility_cell import same_answers
    from lowres.bridges.transformers import resolve

    one, inputs, _, batch, trained = tried
    base = Path(resolve(one.model.checkpoint).location)
    with pytest.raises(LowresError, match="saved model"):
        same_answers(one, inputs, base, batch, trained)


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
    table.cells["lora + nf4_weights"].outcome = "refused"
    assert "was refused on" in told(one, table) and "for a reason" in told(one, table)


def test_a_form_of_a_lever_is_looked_up_in_its_own_cells(raw_recipe: Any) -> None:
    """Behaviour: what holds of stage 2 says nothing of stage 3."""
    table = Table(cells=dict(Table.read().cells))
    table.cells["lora + zero stage 3"] = Cell("fails", "for a reason", "any", 0.0)
    levers = [{"name": "zero", "stage": 3}]
    assert "lora + zero stage 3 fails" in told(
        load_recipe(raw_recipe(method="lora", levers=levers)), table
    )
    assert "compatibility: run on" in told(
        load_recipe(raw_recipe(method="lora", levers=["zero"])), table
    )


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (["method=full", "levers=[nf4_weights]"], ["levers=[]", "method=lora"]),
        (["levers=[gradient_checkpointing, nf4_weights, bf16_weights]"],
         ["levers=[gradient_checkpointing, nf4_weights]"]),
        (["levers=[{name: bf16_weights}, int8_weights, nf4_weights]"],
         ['levers=[{"name": "bf16_weights"}]']),
        (["levers=[nf4_weights, {name: zero, stage: 3}]"],
         ["levers=[nf4_weights, zero]", "levers=[nf4_weights]"]),
        (["levers=[zero]", "optimizer={name: adafactor, lr: 0.001}"],
         ["optimizer={name: adamw, lr: 0.001}", "levers=[]"]),
        (["levers=[nf4_weights]", "loop.epoch=1"], []),
        (["method.rnk=3"], []),
        (["method.rank=three"], []),
        (["levers=[nf4_wieghts]"], []),
    ],
)  # fmt: skip
def test_the_nearest_that_works_is_named(
    changes: list[str], wanted: list[str], tmp_path: Path
) -> None:
    """Behaviour: by `lowres check`; each of what is named is accepted in turn, and the table has no
    word against it. Where no such change helps none is named, and none for a slip of spelling or
    of type, which another method would only hide."""
    from typer.testing import CliRunner

    from lowres.cli.check import app

    recipe = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
    told_to = lambda words: [recipe, *(part for word in words for part in ("--set", word))]
    done = CliRunner().invoke(app, told_to(changes))
    assert done.exit_code == 2
    lines = done.output.splitlines()
    named = [shlex.split(one)[-1] for one in lines if "nearest that works" in one]
    assert named == wanted
    for change in named:
        again = CliRunner().invoke(app, told_to([*changes, change]))
        assert again.exit_code == 0 and "ok" in again.output, again.output


def test_a_cell_that_does_not_work_is_not_the_nearest() -> None:
    """Behaviour: what the table says goes before what the parts say."""
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    table = Table(cells=dict(Table.read().cells))
    changes = ["method=full", "levers=[nf4_weights, gradient_checkpointing]"]
    assert nearest(recipe, changes, table) == ["levers=[gradient_checkpointing]", "method=lora"]
    works = table.cells["lora + nf4_weights + gradient_checkpointing"]
    broken = dataclasses.replace(works, outcome="fails")
    table.cells["lora + nf4_weights + gradient_checkpointing"] = broken
    assert nearest(recipe, changes, table) == ["levers=[gradient_checkpointing]", "method=bitfit"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compatibility", "--only", "lorra"], "no combination holds 'lorra'; did you mean 'lora'"),
        (["compatibility", "--records", "here"], "leave --records out"),
        (["smoke.yaml", "--only", "lora"], "it goes with `lowres bench compatibility`"),
    ],
)  # fmt: skip
def test_what_would_run_nothing_leaves_the_table_alone(words: list[str], said: str) -> None:
    """Behaviour: neither its cells nor where they come from are written."""
    from typer.testing import CliRunner

    from lowres.cli.bench import app
    from lowres.core.compatibility import PATH

    before = PATH.stat().st_mtime_ns
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, InputError) and said in str(done.exception)
    assert PATH.stat().st_mtime_ns == before


def test_a_table_that_lacks_nothing_keeps_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Behaviour: versions and commit are those of the newest cells, and none was run."""
    from lowres.cli import bench

    table = Table.read()
    table.environment = {"commit": "of its cells"}
    monkeypatch.setattr(Table, "read", lambda: table)
    monkeypatch.setattr(Table, "write", lambda self: None)
    bench._compatibility(tmp_path, "", lambda _: None)
    assert table.environment == {"commit": "of its cells"}
