"""The HTML page of plans. All tests check behaviour: what a reader must and must not find."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import pytest

from lowres.core.errors import InputError
from lowres.core.plan import (
    CATEGORIES,
    Candidate,
    Card,
    Category,
    Cell,
    Change,
    Curve,
    Fit,
    Matrix,
    MemoryPlan,
    PhasePlan,
    PlanPhase,
    StepPlan,
)
from lowres.core.units import GIB, MIB, format_bytes, format_seconds
from lowres.report.plan_page import render, verdict, write_plan_page
from tests.report.test_page import Page

CARD = Card("Some Card 12 GB", "cuda", 12 * GIB, 400 * MIB, 12 * GIB - 700 * MIB)


def a_phase(activations: int, instant: str, **changes: Any) -> PhasePlan:
    """One in which every category is alive, each with another size."""
    categories: dict[Category, int] = {c: (i + 1) * 37 * MIB for i, c in enumerate(CATEGORIES)}
    categories |= {"weights": 6 * GIB, "activations": activations}
    fields: dict[str, Any] = {
        "live_bytes": sum(categories.values()),
        "allocated_bytes": sum(categories.values()) + 3 * MIB,
        "reserved_bytes": sum(categories.values()) + 700 * MIB,
        "host_bytes": 11 * MIB, "categories": categories, "instant": instant,
        "module": "model.layers.17.mlp", "operation": "aten.mm.default",
    }  # fmt: skip
    return PhasePlan(**fields | changes)


def a_curve() -> Curve:
    """Two micro-batches: activations rise, then fall while gradients rise; then the update."""
    names = [f"{stage} of model.layers.{i}" for stage in ("forward", "backward") for i in range(20)]
    instants = [*names, *names, *["optimizer step"] * 6]
    n = len(instants)
    rise = [min(i % 40, 40 - i % 40) * 90 * MIB if i < 80 else 0 for i in range(n)]
    return Curve({"weights": [6 * GIB] * n, "gradients": [i * 3 * MIB for i in range(n)],
                  "activations": rise}, instants)  # fmt: skip


def a_plan(**changes: Any) -> MemoryPlan:
    phases: dict[PlanPhase, PhasePlan] = {
        "load": a_phase(0, "loading"),
        "first_step": a_phase(900 * MIB, "backward of model.layers.17"),
        "steady_steps": a_phase(1100 * MIB, "backward of model.layers.18"),
        "evaluate": a_phase(500 * MIB, "predict of model.layers.3"),
        "save": a_phase(1 * MIB, "between steps", module="", operation=""),
        "resume": a_phase(2 * MIB, "between steps", module="", operation=""),
    }
    fields: dict[str, Any] = {
        "recipe": {
            "model": {"checkpoint": "some/model-3B"}, "task": {"name": "gsm8k"},
            "method": {"name": "lora", "rank": 16}, "freezing": {"name": "none"},
            "objective": {"name": "next_token"}, "optimizer": {"name": "adamw"},
            "levers": [{"name": "gradient_checkpointing"}], "procedure": {"name": "finetune"},
            "loop": {"micro_batch_size": 2, "global_batch_size": 16, "max_length": 2048},
        },
        "digest": "0123456789abcdef", "card": CARD, "phases": phases,
        "peak_phase": "steady_steps", "needed_bytes": 9 * GIB + 423 * MIB, "fits": True,
        "host_needed_bytes": 3 * GIB + 7 * MIB, "host_fits": None, "trainable": 41_943_040,
        "total": 3_072_204_288,
        "step": StepPlan(6.86, 4.12, 11.67, 1193.4, {
            "matrix products": 3.6, "attention": 0.61, "memory traffic": 2.62, "launches": 0.03,
        }, "datasheet rates"),
        "curve": a_curve(), "shapes": "the data of the run",
        "depth": "extended from 4 of 32 blocks", "band_bytes": 150 * MIB,
        "planning_seconds": 11.3, "blocks": [32],
        "changes": [
            Change("+ nf4_weights", ["levers=[gradient_checkpointing, nf4_weights]"],
                   5 * GIB, 1.3, 4 * GIB + 123 * MIB, True),
            Change("- gradient_checkpointing", ["levers=[]"], -7 * GIB, 0.75, 16 * GIB, False),
            Change("half the micro-batch", ["loop.micro_batch_size=1"], problem="is 1 already"),
        ],
        "unknown": ["custom.rotate.default"], "notes": ["the whole depth was traced: it varies"],
        "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    return MemoryPlan(**fields | changes)


def too_big(**changes: Any) -> MemoryPlan:
    return a_plan(needed_bytes=14 * GIB, fits=False, **changes)


def a_fit(**changes: Any) -> Fit:
    """A front of six, of which two have a known quality and one no time."""
    candidates = [
        Candidate({"method": "lora", "levers": ["nf4_weights"], "loop.max_length": 512},
                  4 * GIB, True, 9.5, 800.0, 0.61, "2 records of lora on gsm8k", ["nf4_weights"],
                  True),
        Candidate({"method": "bitfit"}, 7 * GIB, True, 6.0, 1300.0, front=True,
                  quality_basis="no record"),
        Candidate({"method": "lora"}, 9 * GIB + 123 * MIB, True, 6.86, 1193.4, 0.63,
                  "2 records of lora on gsm8k"),
        Candidate({"method": "lora", "method.rank": 64}, 9 * GIB + 200 * MIB, True, 6.9, 1180.0,
                  front=True),
        Candidate({"method": "full"}, 40 * GIB, False, 5.0, 1600.0, front=True),
        Candidate({"method": "ia3"}, 41 * GIB, False, None, None, front=True),
    ]  # fmt: skip
    fields: dict[str, Any] = {
        "model": "some/model-3B", "task": "gsm8k", "card": CARD, "goal": "quality",
        "considered": 1812, "candidates": candidates, "chosen": 2, "plan": a_plan(),
        "recipe": "model: {checkpoint: some/model-3B}\nmethod: lora\n", "seconds": 41.0,
        "notes": ["quality is that of records"],
    }  # fmt: skip
    return Fit(**fields | changes)


def a_matrix() -> Matrix:
    cells = [
        Cell(model, card, method, size, fits, speed, problem)
        for method in ("full", "lora")
        for model, card, size, fits, speed, problem in (
            ("some/model-1B", "RTX 3060", 5 * GIB, True, 2100.0, None),
            ("some/model-1B", "H200", 5 * GIB + 9 * MIB, True, 30_100.0, None),
            ("some/model-8B", "RTX 3060", 17 * GIB, False, None, None),
            ("some/model-8B", "H200", None, None, None, "no such head"),
            ("some/model-9B", "H200", 18 * GIB, None, None, None),
        )
    ]
    return Matrix("gsm8k, 1,024 tokens, micro-batches of 1", cells)


KINDS = {"plan": a_plan(), "fit": a_fit(), "matrix": a_matrix()}


@pytest.mark.parametrize("item", KINDS.values(), ids=KINDS)
def test_a_page_asks_for_nothing_from_outside(item: MemoryPlan | Fit | Matrix) -> None:
    """Behaviour: every reference is to the page itself, and there is no script."""
    html = render(item)
    page = Page(html)
    references = page.values("src", "href", "xlink:href", "srcset", "action")
    assert references, "the icon is one"
    assert all(r.startswith(("#", "data:")) for r in references)
    assert all(u.startswith("#") for u in re.findall(r"url\(['\"]?([^)]*)", html))
    assert "script" not in page.tags and "@import" not in html
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    elsewhere = [v for n, v in page.attributes if "http" in v and not n.startswith("xmlns")]
    assert elsewhere == [] and "http" not in page.text
    assert page.open == [], "every element is closed"
    ids = page.values("id")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("make", [a_plan, a_fit, a_matrix])
def test_equal_items_give_equal_pages(make: Any) -> None:
    """Behaviour: a page that is kept in a repository changes only with its plan."""
    assert render(make()) == render(make())


@pytest.mark.parametrize("fit", [False, True])
def test_a_page_shows_every_number_of_the_plan(fit: bool) -> None:
    """Behaviour: sizes, times, counts and words of a plan, alone and as the plan of a fit."""
    plan = a_plan()
    text = Page(render(a_fit() if fit else plan)).text
    sizes = [plan.needed_bytes, plan.host_needed_bytes, plan.band_bytes, CARD.total_bytes,
             CARD.context_bytes, CARD.available_bytes, CARD.offered_bytes]  # fmt: skip
    for phase in plan.phases.values():
        sizes += [phase.live_bytes, phase.allocated_bytes or 0, phase.reserved_bytes or 0]
        sizes += [phase.host_bytes, *(b for b in phase.categories.values() if b)]
        assert phase.instant in text and phase.module in text and phase.operation in text
    for change in plan.changes:
        sizes += [b for b in (change.saved_bytes, change.needed_bytes) if b is not None]
    assert len(sizes) > 80
    assert [format_bytes(b) for b in sizes if format_bytes(b) not in text] == []
    assert plan.step is not None
    times = [plan.step.seconds, plan.step.low_seconds, plan.step.high_seconds,
             *plan.step.parts.values(), plan.planning_seconds]  # fmt: skip
    assert [format_seconds(s) for s in times if format_seconds(s) not in text] == []
    for words in (
        "1,193 tokens per second", "datasheet rates", "41.94 M", "of 3.07 B (1.37%)",
        "1.30x", "0.75x", "-7.00 GiB", "is 1 already", "the data of the run",
        "extended from 4 of 32 blocks", "custom.rotate.default", "it varies", "2.13.0",
        "some/model-3B", "gradient_checkpointing", "micro-batches of 2 with up to 2,048 tokens",
        "0123456789abcdef", "rank: 16", *CATEGORIES, *plan.step.parts,
    ):  # fmt: skip
        assert words in text, words


def test_the_verdict_stands_first_with_need_offer_and_headroom() -> None:
    """Closed form: 12 GiB less 300 MiB offered, 9 GiB and 423 MiB needed."""
    text = Page(render(a_plan())).text
    told = (
        "Fits It needs 9.41 GiB; Some Card 12 GB offers 11.71 GiB: 2.29 GiB stay free."
    )  # fmt: skip
    assert told in text
    assert text.index(told) < text.index("Model some/model-3B")
    assert "headroom 2.29 GiB 20% of what is offered" in text


@pytest.mark.parametrize(
    "changes, kind, title, words",
    [
        ({"band_bytes": 3 * GIB}, "ok", "Fits narrowly", "up to 3.00 GiB higher"),
        ({"host_fits": False}, "bad", "Fits the card, not the host", "over what this machine has"),
        ({"host_fits": False, "recipe": {"budget": {"host_gib": 2}}}, "bad",
         "Fits the card, not the host", "over the budget of 2.00 GiB"),
        ({"needed_bytes": 14 * GIB, "fits": False}, "bad", "Does not fit",
         "2.29 GiB are missing. With \"+ nf4_weights\" it fits, needing 4.12 GiB, at 1.30x"),
        ({"needed_bytes": 14 * GIB, "fits": False, "changes": []}, "bad", "Does not fit",
         "are missing."),
        ({"card": None, "fits": None}, "open", "No card was given", "needs 9.41 GiB"),
        ({"card": dataclasses.replace(CARD, kind="cpu"), "fits": None, "host_fits": True}, "ok",
         "Fits", "within what this machine has"),
    ],
)  # fmt: skip
def test_verdicts(changes: dict[str, Any], kind: str, title: str, words: str) -> None:
    """Behaviour: one case for each answer that a plan can give; the page shows it as it is."""
    plan = a_plan(**changes)
    found = verdict(plan)
    assert (found.kind, found.title) == (kind, title)
    told = " ".join(found.sentences)
    assert words in told
    assert f"{title} {told}" in Page(render(plan)).text


def test_a_change_is_an_argument_that_a_shell_takes() -> None:
    """Behaviour: quoted where it has to be; a change that cannot be had offers none."""
    text = Page(render(a_plan())).text
    assert "--set 'levers=[gradient_checkpointing, nf4_weights]'" in text
    assert "--set 'levers=[]'" in text
    assert "loop.micro_batch_size=1" not in text
    assert "half the micro-batch cannot be had is 1 already" in text


def test_what_is_not_known_is_a_dash_and_nothing_says_none() -> None:
    """Behaviour: no card, no times, no curve, no allocator, an empty recipe."""
    peak = a_phase(5 * MIB, "", module="", operation="", allocated_bytes=None, reserved_bytes=None)
    plan = a_plan(
        card=None, fits=None, step=None, curve=None, changes=[], unknown=[], notes=[],
        recipe={}, phases={"steady_steps": peak}, versions={}, total=0, trainable=0, blocks=[],
    )  # fmt: skip
    text = Page(render(plan)).text
    assert "None" not in text
    assert "offered -" in text and "tokens per second -" in text
    assert "The rates of the device are not known" in text
    assert "Every operation has a rule." in text


def test_html_in_a_plan_is_shown_as_text() -> None:
    """Behaviour: names, operations, labels and dollars change neither page nor figures."""
    attack = "<script>alert(1)</script>$\\frac$</text></svg>"
    plan = too_big(
        recipe={"model": {"checkpoint": attack}, "method": attack, "levers": [attack]},
        card=dataclasses.replace(CARD, name=attack), shapes=attack, depth=attack,
        unknown=[attack], notes=[attack], versions={attack: attack},
        step=StepPlan(1.0, 0.5, 2.0, 10.0, {attack: 1.0}, attack),
        curve=Curve({"weights": [GIB] * 4}, [attack] * 4),
        phases={"steady_steps": a_phase(0, attack, module=attack, operation=attack)},
        changes=[Change(attack, [attack], 1, 1.0, 1, True), Change("", [], problem=attack)],
    )  # fmt: skip
    candidates = [Candidate({attack: attack}, 1, True, 1.0, 1.0, 0.5, attack, [attack])]
    fit = a_fit(
        model=attack, task=attack, plan=plan, recipe=attack, candidates=candidates, chosen=0,
        notes=[attack], instead=[Change(attack, [attack])],
    )  # fmt: skip
    matrix = Matrix(attack, [Cell(attack, attack, attack, None, None, None, attack)])
    for item in (plan, fit, matrix):
        html = render(item)
        assert "<script" not in html and "script" not in Page(html).tags
        assert "&lt;script&gt;" in html
        assert Page(html).open == []


def test_a_fit_shows_the_recipe_then_its_plan_then_the_front() -> None:
    """Behaviour: the order of the page, each candidate with its numbers, the chosen one marked."""
    html = render(a_fit())
    text = Page(html).text
    order = ["Fits The best for quality of 1,812 recipes weighed", "The chosen recipe",
             "model: {checkpoint: some/model-3B} method: lora", "What the peak is made of",
             "The front: memory, time, quality", "How the plan was made"]  # fmt: skip
    at = [text.index(words) for words in order]
    assert at == sorted(at)
    for words in (
        "method: lora , levers: [nf4_weights] , loop.max_length: 512 4.00 GiB fits 9.50 s 800 "
        "0.6100 2 records of lora on gsm8k nf4_weights",
        "2 method: bitfit 7.00 GiB fits 6.00 s 1,300 unknown no record no",
        "3 chosen method: lora (not on the front) 9.12 GiB fits 6.86 s 1,193 0.6300",
        "5 method: full 40.00 GiB does not fit 5.00 s 1,600 unknown no",
        "6 method: ia3 41.00 GiB does not fit - - unknown no",
        "and so not drawn: 1.",
        "quality is that of records",
    ):
        assert words in text, words
    assert "against memory needed, 5 recipes" in html


def test_a_fit_without_an_answer_says_what_would_fit() -> None:
    """Behaviour: the verdict, the least need, and the table of what to change instead."""
    instead = [Change("a smaller model", ["model.checkpoint=some/model-1B"], 3 * GIB, 0.4, GIB,
                      True)]  # fmt: skip
    fit = a_fit(chosen=None, plan=None, recipe=None, instead=instead)
    text = Page(render(fit)).text
    assert (
        "Nothing fits None of 1,812 recipes fits Some Card 12 GB, which offers 11.71 GiB. "
        "The smallest needs 4.00 GiB."
    ) in text
    assert (
        "a smaller model 3.00 GiB 1.00 GiB 0.40x fits --set model.checkpoint=some/model-1B"
    ) in text
    assert "The chosen recipe" not in text
    nothing = Page(render(a_fit(chosen=None, plan=None, recipe=None, candidates=[]))).text
    assert "Nothing fits" in nothing and "The front" not in nothing


def test_a_fit_whose_times_are_unknown_has_no_figure() -> None:
    """Behaviour: the reason stands where the figure would be."""
    candidates = [Candidate({"method": "lora"}, GIB, True, None, None)]
    text = Page(render(a_fit(candidates=candidates, chosen=0, plan=None))).text
    assert "no time is planned and there is no figure" in text
    assert "It needs 1.00 GiB on Some Card 12 GB" in text


def test_a_matrix_tells_each_cell_in_words() -> None:
    """Behaviour: a table for each method; what fits does not rest on a colour."""
    text = Page(render(a_matrix())).text
    row = (
        "some/model-1B fits needs 5.00 GiB 2,100 tokens/s fits needs 5.01 GiB 30,100 tokens/s "
        "some/model-8B does not fit needs 17.00 GiB refused reason 1 "
        "some/model-9B - no verdict needs 18.00 GiB"
    )
    for method in ("full", "lora"):
        assert f"Method: {method} model RTX 3060 H200 {row}" in text
    title = "4 of 10 combinations of model, card and method fit"
    assert f"{title} 2 do not fit, 2 are refused, 2 have no verdict." in text
    assert "All of them share: gsm8k, 1,024 tokens, micro-batches of 1." in text
    assert text.count("no such head") == 1


def test_a_matrix_has_its_longer_side_downwards() -> None:
    """Behaviour: with more cards than models, cards are the rows, so that the page prints."""
    cells = [Cell("some/model", card, "lora", GIB, True) for card in ("T4", "L4", "A10")]
    text = Page(render(Matrix("all", cells))).text
    assert "card some/model T4 fits needs 1.00 GiB L4 fits needs 1.00 GiB A10" in text
    assert "3 of 3 combinations" in text


def test_what_all_candidates_share_is_told_once() -> None:
    """Behaviour: a setting that tells no two of them apart stands above the table."""
    candidates = [
        Candidate({"method": name, "loop.max_length": 512}, GIB, True, 1.0, 9.0, front=True)
        for name in ("lora", "ia3")
    ]
    text = Page(render(a_fit(candidates=candidates, chosen=0))).text
    assert "cheapest in memory first. All have loop.max_length: 512 ." in text
    assert text.count("loop.max_length: 512") == 1


@pytest.mark.parametrize("kind", ["cuda", "mps", "cpu"])
def test_every_kind_of_card_has_a_page(kind: Literal["cuda", "mps", "cpu"]) -> None:
    """Behaviour: without a context none is told."""
    card = dataclasses.replace(CARD, kind=kind, context_bytes=0)
    text = Page(render(a_plan(card=card, fits=None if kind == "cpu" else True))).text
    assert "the driver's context" not in text
    assert "the card's memory 12.00 GiB" in text


def test_only_pages_are_overwritten(tmp_path: Path) -> None:
    """Behaviour: a page is replaced; a path that is no page's, or cannot be written, is refused."""
    page = tmp_path / "page.html"
    page.write_text("old")
    write_plan_page(a_matrix(), page)
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    with pytest.raises(InputError, match="end in .html"):
        write_plan_page(a_matrix(), tmp_path / "plan.json")
    with pytest.raises(InputError, match="cannot be written"):
        write_plan_page(a_matrix(), tmp_path / "nowhere" / "page.html")
