"""Reading recipes: every problem at once, with its line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowres.core.errors import InputError
from lowres.core.reading import load_recipe

GOOD = """\
schema: 1
model: {checkpoint: somewhere/model}
task: grammaticality
method: {name: lora, rank: 4}
objective: classification
optimizer: {name: adamw, lr: 2e-4}
loop:
  steps: 3
  micro_batch_size: 2
  global_batch_size: 4
  max_length: 16
"""


def problems(text: str, tmp_path: Path, *overrides: str) -> list[str]:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return [str(p) for p in caught.value.problems]


def test_a_good_recipe_fills_in_defaults_and_reads_2e_4_as_a_number(tmp_path: Path) -> None:
    """Behaviour: YAML 1.1 alone would read 2e-4 as text."""
    path = tmp_path / "r.yaml"
    path.write_text(GOOD)
    recipe = load_recipe(path)
    assert recipe.optimizer.lr == 2e-4  # type: ignore[attr-defined]
    assert recipe.freezing.name == "none" and recipe.procedure.name == "finetune"
    assert recipe.loop.accumulation == 2
    assert load_recipe(path, ["budget.minutes=3"]).digest == recipe.digest
    assert load_recipe(path, ["loop.seed=3"]).digest != recipe.digest


def test_every_problem_comes_at_once_with_its_line(tmp_path: Path) -> None:
    """Behaviour: an unknown key, a wrong type, a missing key, an unknown part, in one message."""
    text = GOOD.replace("rank: 4", "rnak: 4").replace("steps: 3", "steps: three")
    text = text.replace("  max_length: 16\n", "").replace("adamw", "adamv") + "taks: cola\n"
    found = problems(text, tmp_path)
    assert "`method.rnak` (line 4): is not a field; did you mean 'rank'?" in found
    assert any(p.startswith("`loop.steps` (line 8): is 'three'; ") for p in found)
    assert "`loop.max_length` (line 7): is missing" in found
    named = "`optimizer` (line 6): no optimizer is named 'adamv'; did you mean 'adamw'?"
    assert named in found
    assert "`taks` (line 11): is not a key; did you mean 'task'?" in found
    assert len(found) == 5


@pytest.mark.parametrize("section", ["model", "task", "method", "objective", "optimizer", "loop"])
def test_a_missing_section_is_named(section: str, tmp_path: Path) -> None:
    """Behaviour."""
    import yaml

    keys = yaml.safe_load(GOOD)
    del keys[section]
    assert f"`{section}`: is missing" in problems(yaml.safe_dump(keys), tmp_path)


@pytest.mark.parametrize(
    "change, expected",
    [
        (("  steps: 3\n", ""), "`loop` (line 7): give exactly one of `epochs` and `steps`"),
        (("global_batch_size: 4", "global_batch_size: 5"), "2 does not divide global_batch_size 5"),
        (("rank: 4", "rank: 0"), "`method.rank` (line 4): is 0; input should be greater than"),
        (("rank: 4", "rank: true"), "`method.rank` (line 4): is True;"),
        (("schema: 1", "schema: 9"), "`schema` (line 1): is 9; this version reads 1"),
        (("task: grammaticality", "task: [cola]"), "`task` (line 3): is ['cola']; give a name"),
        (
            ("task: grammaticality", "task: grammaticality\ntask: cola"),
            "the key 'task' stands twice",
        ),
        (
            ("loop:", "loop:\n  updates: 3"),
            "`loop.updates` (line 8): is not a field; there are epochs,",
        ),
        (("objective: cl", "recipes: 1\nobjective: cl"), "is not a key; there are schema, model,"),
        (("task: grammaticality", "task: {name: grammaticality, q: 1}"), "; there are train_ex"),
        (("loop:", "freezing: {name: none, q: 1}\nloop:"), "is not a field; it takes none"),
        (("objective: classification", "objective: next_token"), "cannot serve the task"),
        (("loop:", "loop: ["), "it is not valid YAML"),
    ],
)
def test_each_kind_of_mistake_has_its_message(
    change: tuple[str, str], expected: str, tmp_path: Path
) -> None:
    """Behaviour: the value, the line, the reason."""
    found = problems(GOOD.replace(*change), tmp_path)
    assert any(expected in p for p in found), found


def test_levers_are_a_list_and_none_stands_twice(tmp_path: Path) -> None:
    """Behaviour."""
    assert "give a list" in problems(GOOD + "levers: gradient_checkpointing\n", tmp_path)[0]
    twice = GOOD + "levers: [gradient_checkpointing, gradient_checkpointing]\n"
    assert problems(twice, tmp_path) == [
        "`levers` (line 12): 'gradient_checkpointing' stands twice"
    ]


def test_overrides_reach_into_parts_and_lists(tmp_path: Path) -> None:
    """Behaviour: a name becomes a mapping where a field below it is set."""
    path = tmp_path / "r.yaml"
    path.write_text(GOOD + "levers: [gradient_checkpointing]\n")
    recipe = load_recipe(
        path, ["task.eval_examples=7", "method=bitfit", "levers=[]", "loop.seed=5"]
    )
    assert recipe.task.eval_examples == 7 and recipe.method.name == "bitfit"
    assert recipe.levers == () and recipe.loop.seed == 5


def test_precision_no_needs_no_quotes(tmp_path: Path) -> None:
    """Behaviour: YAML 1.1 reads it as false, in a file and on the command line."""
    path = tmp_path / "r.yaml"
    path.write_text(GOOD)
    plain = load_recipe(path, ["loop.precision=bf16"])
    assert load_recipe(path, ["loop.precision=no"]).loop.precision == "no" != plain.loop.precision
    path.write_text(GOOD + "  precision: no\n")
    assert load_recipe(path).digest == load_recipe(path, ["loop.precision='no'"]).digest


@pytest.mark.parametrize("override", ["loop.seed", "=3", "levers.4.name=x", "schema.x=3"])
def test_a_wrong_override_is_named(override: str, tmp_path: Path) -> None:
    """Behaviour."""
    text = GOOD + "levers: [gradient_checkpointing]\n"
    assert "`--set`" in problems(text, tmp_path, override)[0]


@pytest.mark.parametrize("name", ["2024-12-01", "2024-13-01"])
def test_nothing_in_a_recipe_is_a_date(name: str, raw_recipe: Callable[..., Any]) -> None:
    """Behaviour: a folder may be called like one, even like one that there is not."""
    task = {"name": "sst2", "folder": "x"}
    assert load_recipe(raw_recipe(task=task), [f"task.folder={name}"]).task.folder == name


@pytest.mark.parametrize("seed", ["-1", str(2**63)])
def test_a_seed_is_one_that_torch_takes(seed: str, raw_recipe: Callable[..., Any]) -> None:
    """Behaviour."""
    with pytest.raises(InputError, match="`loop.seed`"):
        load_recipe(raw_recipe(), [f"loop.seed={seed}"])


def test_a_file_that_is_not_there_or_not_text_is_one_message(tmp_path: Path) -> None:
    """Behaviour."""
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(tmp_path / "b.yaml")
    (tmp_path / "a.yaml").write_text("model: &a [*a]")
    with pytest.raises(InputError, match="stands within what it names"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "e.yaml").write_text("")
    with pytest.raises(InputError, match="holds no keys"):
        load_recipe(tmp_path / "e.yaml")


def test_resolving_names_every_key(recipe: Callable[..., Any]) -> None:
    """Behaviour: what is written beside the results needs no defaults to be understood."""
    resolved = recipe().resolved()
    assert resolved["method"] == {"name": "full"}
    assert resolved["optimizer"]["betas"] == [0.9, 0.999]
    assert resolved["loop"]["schedule"] == "linear"
