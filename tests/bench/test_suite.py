"""Suites: many recipes, one searched value, several seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowres.bench import suite as suite_module
from lowres.bench.searching import as_good_as_best
from lowres.core import registry
from lowres.core.errors import InputError
from lowres.core.reading import load_recipe
from lowres.core.record import Score, from_file, to_json
from tests.conftest import ROOT


def written(folder: Path, **changes: Any) -> Path:
    asked = {
        "name": "several",
        "methods": {"recipe": "quickstart.yaml", "tasks": {"a": ["task.data_seed=0"]}},
        "seeds": [0, 1],
        "search": {
            "key": "optimizer.lr", "times_hint": [2, 0.5], "split": "held_out",
            "settings": ["task.hold_out=50"],
        },
    }  # fmt: skip
    file = folder / "suite.yaml"
    file.write_text(yaml.safe_dump(asked | changes))
    return file


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Folder and name of each run, which is not made; the larger rate scores better."""
    made: list[tuple[str, str]] = []

    def one(recipe: str, changes: Any, target: Path, scratch: Path, say: Any) -> Any:
        home = target.parent.parent if target.parent.name == "search" else target.parent
        made.append((home.parent.name, target.stem))
        rate = float(next(c.partition("=")[2] for c in changes if c.startswith("optimizer.lr")))

        class Record:
            @staticmethod
            def final_scores() -> list[Any]:
                named = {"split": "held_out", "metric": "accuracy", "value": rate, "stderr": 0.0}
                return [type("Score", (), named)]

        return Record()

    monkeypatch.setattr(suite_module, "_one", one)
    return made


def test_a_cut_leaves_whole_comparisons(
    ran: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: seeds outermost, then tasks; each method is searched with the same number of runs
    before the first seed of its task."""
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    (tmp_path / "quickstart.yaml").symlink_to(recipe)
    monkeypatch.chdir(tmp_path)
    names = [n for n in registry.names("method") if n in ("full", "lora", "houlsby")]
    methods = {"recipe": "quickstart.yaml", "names": names,
               "tasks": {"a": ["task.data_seed=0"], "b": ["task.data_seed=1"]}}  # fmt: skip
    loaded = suite_module.load(written(tmp_path, methods=methods))
    suite_module.run(loaded, tmp_path / "records", tmp_path / "scratch", lambda _: None)
    finals = [(folder, stem) for folder, stem in ran if "seed" in stem]
    wanted = [(f"several-{t}", f"{n}-seed{s}") for s in (0, 1) for t in "ab" for n in names]
    assert finals == wanted
    assert len(ran) - len(finals) == 2 * len(names) * 2
    first = ran.index(finals[0])
    assert all(folder == "several-a" for folder, _ in ran[:first])


@pytest.mark.parametrize(("stderr", "taken"), [(0.0, 4.0), (0.09, 4.0), (0.11, 2.0), (9.0, 1.0)])
def test_of_what_scores_alike_the_smallest_is_taken(
    stderr: float, taken: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Closed form: within one standard error of the best, which 8 is not: it left no number."""
    scores = {1.0: 0.2, 2.0: 0.7, 4.0: 0.8, 8.0: float("nan")}

    def one(recipe: str, changes: Any, *_: Any) -> Any:
        rate = float(changes[-1].partition("=")[2])
        score = Score("held_out", "accuracy", scores[rate], stderr, 50, None, 1)
        return type("Record", (), {"final_scores": staticmethod(lambda: [score])})

    monkeypatch.setattr(suite_module, "_one", one)
    search = suite_module.load(written(tmp_path)).search
    assert search is not None
    recipe = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
    found = suite_module._searched(
        search, "lora", recipe, [], list(scores), tmp_path, tmp_path, lambda _: None
    )
    assert found == taken


def test_keys_of_whole_numbers_can_be_searched() -> None:
    """Behaviour: what a search writes, such keys and those of other numbers read alike."""
    recipe = str(ROOT / "recipes" / "quickstart.yaml")
    for key, value in (("method.rank", 4.0), ("optimizer.lr", 1.0), ("optimizer.lr", 0.003)):
        read = load_recipe(recipe, [f"{key}={suite_module._number(value)}"])
        family, field = key.split(".")
        assert getattr(getattr(read, family), field) == value


def test_records_that_could_not_be_kept_are_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Behaviour: hours before."""
    monkeypatch.setattr(suite_module.subprocess, "run", lambda *a, **k: pytest.fail("it ran"))
    (tmp_path / "file").write_text("")
    target, recipe = tmp_path / "file" / "cpu" / "one.json", ROOT / "recipes" / "quickstart.yaml"
    with pytest.raises(InputError, match="is no folder"):
        suite_module._one(str(recipe), [], target, tmp_path / "scratch", lambda _: None)


def test_a_suite_that_is_not_text_is_one_message(tmp_path: Path) -> None:
    """Behaviour."""
    (tmp_path / "suite.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        suite_module.load(tmp_path / "suite.yaml")


def test_a_search_knows_which_way_a_metric_of_its_own_goes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Closed form: fewer bits for a character are better, though it is not the task's metric."""
    bits = {1.0: 2.0, 2.0: 1.0, 4.0: 3.0}

    def one(recipe: str, changes: Any, *_: Any) -> Any:
        rate = float(changes[-1].partition("=")[2])
        score = Score("held_out", "bits_per_character", bits[rate], 0.0, 50, None, 1)
        return type("Record", (), {"final_scores": staticmethod(lambda: [score])})

    monkeypatch.setattr(suite_module, "_one", one)
    search = suite_module.load(written(tmp_path)).search
    assert search is not None
    search = replace(search, metric="bits_per_character")
    recipe = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
    text = ["task={name: text, files: [a.txt]}", "objective=next_token"]
    found = suite_module._searched(
        search, "lora", recipe, text, list(bits), tmp_path, tmp_path, lambda _: None
    )
    assert found == 2.0


@pytest.mark.parametrize(
    ("scores", "taken"),
    [({1.0: 0.70, 4.0: 0.69}, 4.0), ({1.0: 0.75, 4.0: 0.69}, 1.0), ({1.0: 0.70, 2.0: 0.7}, 1.0)],
)
def test_what_was_chosen_before_is_kept_unless_another_is_better(
    scores: dict[float, float], taken: float
) -> None:
    """Closed form: by more than one standard error, .05."""
    told = {v: Score("held_out", "accuracy", s, 0.05, 50, None, 1) for v, s in scores.items()}
    assert as_good_as_best(told, before=4.0) == taken
    losses = {v: replace(s, value=-s.value) for v, s in told.items()}
    assert as_good_as_best(losses, 4.0, sign=-1.0) == taken


def test_a_record_from_before_a_key_came_is_still_of_its_recipe(tmp_path: Path) -> None:
    """Behaviour: what a record does not say had its default; another value is another run."""
    runs = ROOT / "benchmarks" / "records" / "methods-minilm-sst2" / "cpu"
    old = from_file(runs / "lora-seed0.json")
    wanted = load_recipe(old.recipe)
    assert old.digest == wanted.digest
    del old.recipe["model"]["dropout"], old.recipe["task"]["folder"]
    old.digest = "0" * 16
    target = tmp_path / "one.json"
    target.write_text(to_json(old))
    assert suite_module._one(old.recipe, [], target, tmp_path, print).digest == old.digest
    with pytest.raises(InputError, match="of another recipe"):
        suite_module._one(old.recipe, ["model.dropout=0.5"], target, tmp_path, print)


def test_later_tasks_search_around_what_the_first_chose(
    ran: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed form: twice LoRA's highest rate, 1e-3, was best; then that and half of it."""
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    (tmp_path / "quickstart.yaml").symlink_to(recipe)
    monkeypatch.chdir(tmp_path)
    methods = {"recipe": "quickstart.yaml", "names": ["lora"],
               "tasks": {"a": [], "b": [], "c": []}}  # fmt: skip
    search = {"key": "optimizer.lr", "times_hint": [2, 0.5], "then_times": [1, 0.5],
              "split": "held_out", "settings": ["task.hold_out=50"]}  # fmt: skip
    loaded = suite_module.load(written(tmp_path, methods=methods, search=search))
    suite_module.run(loaded, tmp_path / "records", tmp_path / "scratch", lambda _: None)
    highest = registry.load("method", "lora").learning_rate_hint[1]
    tried = {task: [s for f, s in ran if f == f"several-{task}" and "seed" not in s]
             for task in "abc"}  # fmt: skip
    assert tried["a"] == [f"lora-{highest * f:g}" for f in (0.5, 2)]
    assert tried["b"] == tried["c"] == [f"lora-{highest * f:g}" for f in (1, 2)]


def test_methods_are_compared_with_their_own_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Closed form: recipes of all methods, field by field."""
    recipe = Path(__file__).parents[2] / "recipes" / "cola" / "minilm-lora-cpu.yaml"
    (tmp_path / "cola.yaml").symlink_to(recipe)
    monkeypatch.chdir(tmp_path)
    methods = {"recipe": "cola.yaml", "tasks": {"a": []}}
    loaded = suite_module.load(written(tmp_path, methods=methods))
    ((_, _, entries),) = suite_module._groups(loaded, lambda _: None)
    assert entries.keys() == set(registry.names("method"))
    for name, (file, changes) in entries.items():
        assert load_recipe(file, changes).method == registry.load("method", name)()


def test_recipes_or_methods(tmp_path: Path) -> None:
    """Behaviour: one of the two, and not both."""
    with pytest.raises(InputError, match="either recipes or methods"):
        suite_module.load(written(tmp_path, recipes={"a": "a.yaml"}))


def test_a_run_that_fails_stops_no_other(
    ran: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: a value that fails is not chosen, a method all of whose values fail has no final
    runs, and what is missing is named at the end."""
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    (tmp_path / "quickstart.yaml").symlink_to(recipe)
    monkeypatch.chdir(tmp_path)
    make, failed = suite_module._one, []

    def one(recipe: str, changes: Any, target: Path, scratch: Path, say: Any) -> Any:
        if target.name.startswith("full") or (target.name.startswith("lora") and len(failed) < 3):
            failed.append(target.stem)
            raise suite_module.RunFailed(f"{target.stem} ended failed")
        return make(recipe, changes, target, scratch, say)

    monkeypatch.setattr(suite_module, "_one", one)
    methods = {"recipe": "quickstart.yaml", "names": ["full", "lora", "houlsby"],
               "tasks": {"a": ["task.data_seed=0"]}}  # fmt: skip
    loaded = suite_module.load(written(tmp_path, methods=methods))
    said: list[str] = []
    with pytest.raises(suite_module.RunFailed, match="no result of several-a/full; the reasons"):
        suite_module.run(loaded, tmp_path / "records", tmp_path / "scratch", said.append)
    finals = [stem for _, stem in ran if "seed" in stem]
    assert finals == [f"{name}-seed{seed}" for seed in (0, 1) for name in ("lora", "houlsby")]
    # Both values of full, not tried again for the second seed, and the smaller one of lora.
    assert len(failed) == 3 and sum(stem.startswith("full") for stem in failed) == 2
    assert all(f"{stem} ended failed" in said for stem in failed)
