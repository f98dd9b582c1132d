"""Searching: the closed form against traces, the choice, the file; tables of models by cards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowres.core.errors import InputError
from lowres.core.reading import load_recipe
from lowres.memory import device as devices
from lowres.memory.closed_form import ClosedForm, probe_lengths
from lowres.memory.translate import Target
from lowres.planning.assumed import assumed_inputs
from lowres.planning.matrix import METHODS, matrix
from lowres.planning.rehearsal import rehearse
from lowres.recommend.fit import fit
from lowres.report.plan_table import print_matrix

WIDE = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 4000, "num_hidden_layers": 6}


def peak(recipe: Any) -> int:
    inputs = assumed_inputs(recipe, padded=False)  # as the one row that a search traces
    done = rehearse(recipe, inputs, Target("cuda"), quick=True)
    return int(np.cumsum(done.trace.sizes).max())


@pytest.mark.parametrize("levers", [[], [{"name": "gradient_checkpointing"}]])
def test_the_closed_form_is_the_trace_at_other_sizes(
    levers: Any, planned_recipe: Callable[..., Any]
) -> None:
    """Reference: traces at other rows and lengths, within 0.5 %."""
    probe = 64 * 13
    base = planned_recipe(WIDE, levers=levers, loop={"max_length": probe})
    trace = rehearse(base, assumed_inputs(base), Target("cuda"), quick=True).trace
    form = ClosedForm.of(trace, probe)
    assert form.peak_bytes(1, probe) == pytest.approx(peak(base), rel=0.001)
    for rows, length in ((1, 256), (2, 512), (4, 128), (2, 1024)):
        sizes = {"micro_batch_size": rows, "global_batch_size": 2 * rows, "max_length": length}
        there = planned_recipe(WIDE, levers=levers, loop=sizes)
        assert form.peak_bytes(rows, length) == pytest.approx(peak(there), rel=0.005), (
            rows,
            length,
        )


def test_another_optimizer_changes_states_and_step_alone(
    planned_recipe: Callable[..., Any],
) -> None:
    """Reference: the trace with that optimizer, within 0.5 %."""
    probe = 64 * 13
    told = {"method": "full", "loop": {"max_length": probe}}
    eight = {"optimizer": {"name": "adamw_8bit", "lr": 1e-3}}
    base, other = planned_recipe(WIDE, **told), planned_recipe(WIDE, **told, **eight)
    target, inputs = Target("cuda"), assumed_inputs(base)
    whole = rehearse(base, inputs, target, quick=True).trace
    states = rehearse(other, inputs, target, quick=True, states_only=True).trace
    form = ClosedForm.of(whole, probe).with_optimizer(whole, states)
    assert form.peak_bytes(1, probe) == pytest.approx(peak(other), rel=0.005)


@pytest.fixture(scope="module")
def model(config_folder: Callable[..., str]) -> str:
    return config_folder(hidden_size=128, intermediate_size=256, num_hidden_layers=2)


def test_the_chosen_recipe_fits_and_is_a_file_that_runs_read(model: str, tmp_path: Path) -> None:
    """Behaviour: the plan of the written recipe fits, and the front holds nothing beaten."""
    found = fit(model, "gsm8k", devices.generic(1.0), device_gib=1.0)
    assert found.chosen is not None and found.plan is not None and found.plan.fits
    assert found.considered > 500
    file = tmp_path / "fit.yaml"
    file.write_text(found.recipe or "")
    written = load_recipe(file)
    assert written.budget.device_gib == 1.0
    assert written.digest == found.plan.digest
    chosen = found.candidates[found.chosen]
    assert chosen.fits and not chosen.lossy, "with room to spare nothing is approximated"
    assert all(c.quality is None and "no record" in c.quality_basis for c in found.candidates)
    for c in found.candidates:
        assert not c.front or not any(
            o.needed_bytes < c.needed_bytes and (o.seconds or 0) < (c.seconds or 0)
            and len(o.lossy) <= len(c.lossy) for o in found.candidates
        )  # fmt: skip


@pytest.mark.slow
def test_where_nothing_fits_it_says_what_would(config_folder: Callable[..., str]) -> None:
    """Behaviour: no recipe, and numbers of a card that would do."""
    large = config_folder(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=6, vocab_size=128_000
    )
    found = fit(large, "gsm8k", devices.generic(0.5), device_gib=0.5)
    assert found.chosen is None and found.recipe is None
    assert any("card" in change.name for change in found.instead)
    assert all((change.needed_bytes or 0) > 0 for change in found.instead)


def test_the_probe_shares_no_factor_with_a_width() -> None:
    """Closed form: LLaMA-30B is 6656 = 512 x 13 wide."""
    assert probe_lengths([4096, 11008, 32000])[0] == 128 * 13
    assert probe_lengths([6656, 17920, 32000])[0] == 128 * 17


@pytest.mark.slow
def test_minutes_are_a_limit_where_time_is_known(model: str) -> None:
    """Behaviour: too few are refused with the least there is; without data they are only noted."""
    card = devices.load("rtx-3060")
    with pytest.raises(InputError, match="too few"):
        fit("package:lowres/assets/tiny_lm", "grammaticality", card, minutes=1e-6)
    found = fit(model, "gsm8k", devices.generic(1.0), device_gib=1.0, minutes=5.0)
    assert found.chosen is not None
    assert "--minutes" in " ".join(found.notes)


def test_a_table_of_models_by_cards(model: str) -> None:
    """Behaviour: every model, card and method has a cell; a larger card never fits less."""
    cards = [devices.load("rtx-3060"), devices.load("rtx-3090")]
    found = matrix([model], cards)
    assert len(found.cells) == len(cards) * len(METHODS)
    for method in METHODS:
        small, large = (c for c in found.cells if c.method == method)
        assert not small.fits or large.fits


def test_a_table_says_of_a_cpu_what_is_needed_alone(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behaviour: its memory is that of the machine it is in, which is not known."""
    cards = [devices.load("cpu"), devices.load("t4")]
    found = matrix([model], cards)
    assert {cell.fits for cell in found.cells if cell.card == cards[0].name} == {None}
    print_matrix(found)
    told = capsys.readouterr().out
    assert "needs, " in told and "fits, " in told


@pytest.mark.slow
def test_costly_levers_are_searched_only_when_nothing_fits(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: checkpointing put off to a second stage is weighed on a small card alone."""
    from lowres.core import registry

    lever: Any = registry.load("lever", "gradient_checkpointing")
    monkeypatch.setattr(lever, "searched", 1)
    needs = {}
    for gib in (4.0, 0.32):
        found = fit(model, "gsm8k", devices.generic(gib), device_gib=gib, goal="context")
        used = {c.settings["levers"] for c in found.candidates}
        needs[gib] = any("gradient_checkpointing" in told for told in used)
    assert needs == {4.0: False, 0.32: True}


def test_models_of_one_name_keep_their_own_rows(
    config_folder: Callable[..., str], tmp_path: Path
) -> None:
    """Behaviour: two folders that end alike are told by their whole paths."""
    places = []
    for number in ("1", "2"):
        place = tmp_path / number / "model"
        shutil.copytree(config_folder(), place)
        places.append(str(place))
    found = matrix(places, [devices.generic(8.0)])
    assert [c.model for c in found.cells[:: len(METHODS)]] == places
    assert matrix(places[:1], [devices.generic(8.0)]).cells[0].model == "model"
