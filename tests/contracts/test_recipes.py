"""What every recipe file promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lowres.core.errors import NotPlanned
from lowres.core.reading import load_recipe
from lowres.core.schema import json_schema
from tests.conftest import ROOT, sampled

RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if "accelerate" not in p.parts)


def test_there_are_recipes() -> None:
    """Behaviour: all are found, in all folders."""
    assert len(RECIPES) == 23


@pytest.mark.parametrize("path", RECIPES, ids=[p.stem for p in RECIPES])
def test_a_recipe_parses_and_survives_being_written_out(path: Path) -> None:
    """Reference: the recipe read back from its resolved form is the same run."""
    recipe = load_recipe(path)
    again = load_recipe(yaml.safe_load(yaml.safe_dump(recipe.resolved())))
    assert again.digest == recipe.digest
    assert again.resolved() == recipe.resolved()


@pytest.mark.parametrize("path", sampled(RECIPES, every=5), ids=lambda p: p.stem)
def test_a_recipe_fits_its_own_budget(path: Path) -> None:
    """Behaviour: planned for the card or the machine that its budget describes, it fits.

    A model of the hub is planned from its configuration among the data. What is never planned says
    so in its head.
    """
    from lowres.core.paths import data_folder
    from lowres.memory import device
    from lowres.planning.plan import plan

    recipe = load_recipe(path)
    name = recipe.model.checkpoint.rpartition("/")[2]
    if (data_folder() / "configs" / name / "config.json").is_file():
        recipe = load_recipe(path, [f"model.checkpoint={data_folder() / 'configs' / name}"])
    if recipe.model.checkpoint.startswith("runs/"):
        # What the stage before leaves there is of the shape of the embedded model.
        recipe = load_recipe(path, ["model.checkpoint=package:lowres/assets/tiny_lm"])
    gib = recipe.budget.device_gib
    try:
        found = plan(recipe, device.load("cpu") if gib is None else device.generic(gib))
    except NotPlanned as error:
        # A trace that fails is one, too.
        assert type(error) is NotPlanned, error
        assert "Not planned: " in path.read_text(), "the recipe's head does not say so"
        return
    assert found.fits is not False and found.host_fits is not False, found.needed_bytes
    assert not found.unknown


@pytest.mark.parametrize("path", RECIPES, ids=[p.stem for p in RECIPES])
def test_a_recipe_begins_with_its_schema_and_says_how_to_run_it(path: Path) -> None:
    """Behaviour: editors find the schema, readers the command."""
    lines = path.read_text().splitlines()
    schema = lines[0].removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / schema).resolve() == ROOT / "recipes" / "schema.json"
    assert f"lowres run {path.relative_to(ROOT)}" in "\n".join(lines[1:6])


def test_the_schema_file_is_the_one_the_command_prints() -> None:
    """Reference: `lowres schema --output recipes/schema.json`."""
    assert json.loads((ROOT / "recipes" / "schema.json").read_text()) == json.loads(
        json.dumps(json_schema())
    )
