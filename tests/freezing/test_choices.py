"""Which blocks each freezing chooses, against the equations written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowres.bridges.bitsandbytes import is_quantised
from lowres.bridges.unpacking import weights_of
from lowres.core import registry
from lowres.core.errors import InputError
from lowres.core.scored import Scored
from lowres.freezing import _gradients
from lowres.freezing.semantic import _Bases
from lowres.making.build import assemble, build, read, sample_of
from lowres.memory.translate import Target
from lowres.planning import portions
from lowres.planning.rehearsal import rehearse
from tests.conftest import sample_part

NAMES = tuple(f"block.{i}" for i in range(6))
TINY = {"checkpoint": "package:lowres/assets/tiny_lm"}


def make(name: str, **fields: Any) -> Any:
    return registry.load("freezing", name)(**fields)


class Seen(Exception):
    """Stops where a freezing would choose."""


@pytest.fixture
def looked_at(recipe: Callable[..., Any]) -> Callable[..., Any]:
    """A learner as a freezing sees it, before the method, and the sample of its recipe."""

    def look(kind: str = "decoder", **changes: Any) -> tuple[Any, Any]:
        one = recipe(kind, **{"objective": "label_words", "method": "lora"} | changes)
        inputs, seen = read(one), []

        def stop(learner: Any) -> Any:
            seen.append(learner)
            raise Seen

        with pytest.raises(Seen):
            assemble(one, inputs, choose=stop)
        return seen[0], sample_of(one, inputs)

    return look


@pytest.mark.parametrize(
    ("name", "fields", "trained", "stem", "top"),
    [
        ("none", {}, {0, 1, 2}, True, True),
        ("prefix", {"frozen": 2}, {2}, False, True),
        ("suffix", {"frozen": 2}, {0}, True, False),
        ("every", {"nth": 2}, {0, 2}, False, True),
        ("badam", {}, {0, 1, 2}, False, False),
        ("lisa", {}, {0, 1, 2}, True, True),
    ],
)
def test_fixed_choices(
    name: str, fields: Any, trained: set[int], stem: bool, top: bool, recipe: Callable[..., Any]
) -> None:
    """Closed form: places among three blocks, and what lies below and above them."""
    built = build(recipe(freezing={"name": name, **fields}, objective="label_words"))
    blocks = built.learner.blocks
    assert blocks.trained == {blocks.names[place] for place in trained}
    trains = {n: p.requires_grad for n, p in built.model.named_parameters()}
    assert trains["model.decoder.embed_positions.weight"] == stem
    assert trains["model.decoder.final_layer_norm.weight"] == top


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
def test_badam_takes_each_block_once_a_round(order: str) -> None:
    """Closed form: algorithm 1 of the paper; a random order is another in another round."""
    one = make("badam", order=order)
    rounds = [[next(iter(one.active(NAMES, turn))) for turn in range(start, start + 6)]
              for start in range(0, 60, 6)]  # fmt: skip
    assert all(sorted(names) == sorted(NAMES) for names in rounds)
    if order == "random":
        assert len(set(map(tuple, rounds))) > 1
    else:
        assert rounds[0] == list(NAMES if order == "ascending" else reversed(NAMES))


def test_lisa_draws_every_block_as_often() -> None:
    """Closed form: gamma of L without replacement, each with probability gamma / L."""
    one, draws = make("lisa", at_once=2), 3000
    sets = [one.active(NAMES, turn) for turn in range(draws)]
    assert {len(s) for s in sets} == {2}
    for name in NAMES:
        assert sum(name in s for s in sets) / draws == pytest.approx(1 / 3, abs=0.04)


@pytest.mark.parametrize("name", ["lisa", "badam"])
def test_the_lowest_period_is_planned(name: str, recipe: Callable[..., Any]) -> None:
    """Reference: the plan of every block traced; and, for each period, that it reaches lower."""
    model = TINY
    one = recipe(model=model, freezing={"name": name, "period": 2, "seed": 3},
                 objective="label_words", loop={"steps": 20})  # fmt: skip
    inputs = read(one)
    names = build(one).learner.blocks.names
    shown = portions.updates_shown(one, inputs.data, names)
    lows = [min(map(names.index, one.freezing.active(names, turn))) for turn in range(10)]
    assert lows[shown[-1].turn // 2] == min(lows)
    short, whole = (rehearse(one, inputs, Target("cpu"), whole=w) for w in (False, True))
    assert peak(short.trace.sizes) == peak(whole.trace.sizes)


def peak(sizes: Any) -> int:
    live = most = 0
    for size in sizes:
        live += int(size)
        most = max(most, live)
    return most


def test_gradient_norm_and_fisher_are_their_equations(looked_at: Callable[..., Any]) -> None:
    """Reference: whole gradients by autograd, then norms. What was trained is trained after."""
    learner, sample = looked_at()
    model = learner.base
    model.eval()
    before = [p.requires_grad for p in model.parameters()]
    relative = make("gradient_norm", trained=1, rows=8).scores(learner, sample)
    information = make("fisher", trained=1, rows=8).scores(learner, sample)
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())

    model.requires_grad_(True)

    def squares(batch: Any) -> torch.Tensor:
        model.zero_grad()
        sample.loss(learner, batch).backward()
        return torch.stack([
            sum(p.grad.square().sum() for p in model.get_submodule(n).parameters())
            for n in learner.blocks.names
        ])  # fmt: skip

    norms = torch.stack([squares(b).sqrt() for b in sample.batches(8)]).mean(0)
    single = torch.stack([squares(b) for b in sample.batches(8, size=1)]).mean(0)
    of = [list(model.get_submodule(n).parameters()) for n in learner.blocks.names]
    weights = torch.stack([sum(p.detach().square().sum() for p in ps).sqrt() for ps in of])
    counts = torch.tensor([float(sum(p.numel() for p in ps)) for ps in of])
    torch.testing.assert_close(relative, norms / weights)
    torch.testing.assert_close(information, single / counts)


@pytest.mark.parametrize("lever", ["nf4_weights", "int8_weights"])
def test_of_packed_weights_the_gradient_is_that_of_what_they_stand_for(
    lever: str, looked_at: Callable[..., Any]
) -> None:
    """Reference: the same model with the unpacked weights; within the rounding of products with
    packed weights, 2 %."""
    packed, sample = looked_at(model=TINY, levers=[lever])
    plain, _ = looked_at(model=TINY)
    found = _gradients.mean_norms(packed, sample, sample.batches(4), power=1)
    for path, module in packed.base.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and is_quantised(weight):
            plain.base.get_submodule(path).weight.data = next(weights_of(module)).float()
    expected = _gradients.mean_norms(plain, sample, sample.batches(4), power=1)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    counts, norms = _gradients.sizes(packed)
    plain_counts, plain_norms = _gradients.sizes(plain)
    torch.testing.assert_close(norms, plain_norms, rtol=1e-3, atol=0)
    assert torch.equal(counts, plain_counts)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_semantic_bases_are_the_pseudo_inverse(kind: str, looked_at: Callable[..., Any]) -> None:
    """Reference: torch's pseudo-inverse of the whole output layer in float64."""
    learner, _ = looked_at(kind)
    with torch.no_grad():
        bases = _Bases(learner)
        columns = bases.out @ bases.inverse  # rows of (W+)^T, one for each word
        reference = torch.linalg.pinv(bases.out.double()).t().float()
        assert torch.allclose(columns, reference, atol=1e-4)


def test_semantic_gains_are_the_formula(looked_at: Callable[..., Any]) -> None:
    """Reference: hidden states that transformers returns, token by token; the order of rows and
    the padding change nothing."""
    learner, sample = looked_at(model=TINY)
    found = make("semantic", rows=8).scores(learner, sample)
    model = learner.base
    head, words = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    inverse = torch.linalg.pinv(head.detach().double()).t().float()
    unit = torch.nn.functional.normalize
    logs, depth = [], len(learner.blocks.names)
    with torch.no_grad():
        for batch in sample.batches(8, size=1):
            states = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                output_hidden_states=True,
            ).hidden_states  # fmt: skip
            for at, word in enumerate(batch["labels"][0].tolist()):
                if word == -100:
                    continue
                row = []
                for level, state in enumerate(states):
                    share = level / depth
                    place = (1 - share) * unit(words[word], dim=0) + share * unit(
                        inverse[word], dim=0
                    )
                    row.append(1 - torch.cosine_similarity(state[0, at - 1], place, dim=0))
                logs.append(torch.stack(row).log())
    mean = torch.stack(logs).mean(0)
    torch.testing.assert_close(found, mean[:-1] - mean[1:], rtol=1e-3, atol=1e-4)


def test_semantic_freezes_up_to_the_largest_gain() -> None:
    """Closed form: the example of the paper's figure, four layers of which the second is chosen;
    never the last one."""
    one = make("semantic")
    assert one.choice(NAMES[:4], [0.1, 0.9, 0.3, 0.2]) == NAMES[2:4]
    assert one.choice(NAMES[:4], [0.1, 0.2, 0.3, 0.9]) == NAMES[3:4]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"freezing": {"name": "suffix", "frozen": 3}}, "leaves none of the 3"),
        ({"freezing": {"name": "lisa", "at_once": 4}}, "more than the 3 blocks"),
        ({"freezing": {"name": "fisher", "trained": 4}}, "more than the 3 blocks"),
        ({"freezing": "semantic", "objective": "classification"}, "no layer over the words"),
        ({"kind": "encoder_decoder", "freezing": "semantic"}, "an encoder has none"),
    ],
)
def test_what_cannot_be_chosen_is_refused(
    changes: dict[str, Any], words: str, recipe: Callable[..., Any]
) -> None:
    """Behaviour: one error, with a way on."""
    with pytest.raises(InputError, match=words):
        build(recipe(changes.pop("kind", "decoder"), **{"objective": "label_words"} | changes))


@pytest.mark.parametrize("name", ["gradient_norm", "fisher", "semantic"])
def test_the_costliest_choice_takes_most(name: str) -> None:
    """Closed form: as many blocks as the choice, and the lowest that may be trained."""
    one = make(name, **{k: v for k, v in sample_part("freezing", name).items() if k != "name"})
    assert isinstance(one, Scored)
    lows = [NAMES.index(one.choice(NAMES, [float(i == best) for i in range(6)])[0])
            for best in range(6)]  # fmt: skip
    assert NAMES.index(one.costliest(NAMES)[0]) == min(lows)
