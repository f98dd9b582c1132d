"""What `lowres advise` says of methods that it does not plan: refusals and the least they need."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from lowres.core import registry
from lowres.core.errors import InputError
from lowres.core.reading import load_recipe
from lowres.core.units import GIB, MIB
from lowres.memory import device as devices
from lowres.memory.tracer import TraceFailed
from lowres.planning import assumed
from lowres.planning.least import COPIES, least_bytes
from lowres.planning.plan import target_of
from lowres.planning.rehearsal import rehearse_quickly
from lowres.planning.starting import starting_recipe
from lowres.recommend import advice, possible
from tests.conftest import sampled

DEVICE = devices.generic(8.0)


@pytest.fixture(scope="module")
def start(config_folder: Callable[..., str]) -> dict[str, Any]:
    return starting_recipe(config_folder(), "gsm8k")


def _only(monkeypatch: pytest.MonkeyPatch, *methods: str) -> None:
    """Let `advise` know of these alone, which spares the time of the others."""
    names = registry.names
    monkeypatch.setattr(registry, "names", lambda f: list(methods) if f == "method" else names(f))


def test_the_least_of_full_fine_tuning_is_its_parameters_four_times(start: dict[str, Any]) -> None:
    """Closed form: D = 64, F = 160, 4 heads of which 2 are keys, 9 blocks, 997 words, in bfloat16,
    and rotary frequencies in float32; in 4 bits, with a byte of scale for 64 weights, the matrices
    of all blocks fall by the rest."""
    matrices = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160
    parameters = 9 * (matrices + 2 * 64) + 2 * 997 * 64 + 64
    full = load_recipe(start | {"method": {"name": "full"}})
    frequencies = least_bytes(full) - 2 * (1 + COPIES) * parameters
    assert 0 <= frequencies <= 2 * 4 * 16
    config = assumed.config_of(start["model"]["checkpoint"])
    plain = least_bytes(possible._recipe(start, possible.PLAIN, config))
    few = least_bytes(possible._recipe(start, possible.FEW_BITS, config))
    # Each of 7 layers a block holds 16 values of weights, 256 of scales, their mean and scale.
    assert plain - few == 9 * (matrices * (2 - 0.5 - 1 / 64) - 7 * 4 * (16 + 256 + 1 + 1))


@pytest.mark.parametrize("method", sampled(registry.names("method"), every=5))
def test_a_plan_needs_no_less_than_the_least(method: str, start: dict[str, Any]) -> None:
    """Reference: the traced update, with the levers that leave least."""
    config = assumed.config_of(start["model"]["checkpoint"])
    one = advice.Advice(method, 1.0, (0.0, 1.0))
    possible.fill_in([one], start, config, DEVICE)
    if one.refused is not None:
        # There are no biases, and keys have 32 features, half of a group of RoAd.
        assert method in ("bitfit", "road"), one.refused
        return
    levers = possible.FEW_BITS if "nf4" in registry.load("method", method).few_bits() else (
        possible.CHECKPOINTED)  # fmt: skip
    raw = start | {"method": {"name": method}}
    leanest = possible._recipe(raw, levers, config)
    done = rehearse_quickly(leanest, assumed.assumed_inputs(leanest), target_of(DEVICE))
    context = devices.card(DEVICE, None).context_bytes
    assert one.at_least_bytes is not None
    assert one.at_least_bytes - context <= done.trace.peak_bytes()


def test_every_refusal_is_known_without_a_plan(
    start: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: there are no biases to train, and one says no as it is placed. Those that cannot
    have the model follow all others, whatever their scores."""
    monkeypatch.setattr(possible, "PLANNED", 0)
    _only(monkeypatch, "full", "lora", "dora", "ln_tuning", "houlsby", "bitfit", "ia3")
    cls: Any = registry.load("method", "houlsby")

    def refuse(self: Any, model: Any, blocks: Any) -> Any:
        raise InputError("the recipe", ["a block has no place for it"])

    monkeypatch.setattr(cls, "apply", refuse)
    model = start["model"]["checkpoint"]
    found = [a for a in advice.advise(model, 1000, 8.0, None, ()) if a.score is not None]
    refused = [a for a in found if a.refused is not None]
    assert {a.method for a in refused} == {"houlsby", "bitfit"}
    assert len(found) == 7 and found[-2:] == refused
    assert all(a.fits is None and a.at_least_bytes for a in found[:5])
    assert "refused: " in possible.told(refused[0]) and "at least" in possible.told(found[0])


def test_what_cannot_fit_is_known_without_a_plan(
    config_folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed form: 2.4 G weights take 1.2 GiB in 4 bits, more than the card has."""
    monkeypatch.setattr(possible, "rehearse_quickly", None)
    _only(monkeypatch, "full", "lora", "houlsby", "sara")
    wide = {"hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32}
    found = advice.advise(config_folder(**wide), 1000, 1.0, None, ())
    assert all(one.fits is False and one.needed_bytes is None for one in found)
    lora = next(one for one in found if one.method == "lora")
    assert lora.at_least_bytes is not None and 1.2 * GIB < lora.at_least_bytes < 2 * GIB
    assert possible.told(lora).startswith("does not fit: at least 1.")
    assert possible.told(lora).endswith("with gradient_checkpointing + nf4_weights")


def test_what_is_planned_depends_on_no_clock(
    start: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: as many methods as it says, the first that may fit, on a machine of any speed."""
    hours = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(hours)))
    monkeypatch.setattr(possible, "PLANNED", 2)
    names = ("bitfit", "lora", "ln_tuning", "ia3")
    ranked = [advice.Advice(name, 1.0, (0.0, 1.0)) for name in names]
    possible.fill_in(ranked, start, assumed.config_of(start["model"]["checkpoint"]), DEVICE)
    assert [one.needed_bytes is not None for one in ranked] == [False, True, True, False]
    assert ranked[0].refused is not None and ranked[1].fits and ranked[3].fits is None
    (where,) = ranked[3].unknown
    assert where.endswith("--device-gib 8 --set method=ia3")
    assert possible.told(ranked[1]).startswith("fits, planned: ")
    # What the driver gives comes in segments of 2 MiB.
    context = devices.card(DEVICE, None).context_bytes
    assert all(((one.needed_bytes or 0) - context) % (2 * MIB) == 0 for one in ranked[1:3])


def test_a_method_that_wants_more_blocks_than_are_made_is_not_refused(
    start: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: a refusal is that of the whole model."""
    cls: Any = registry.load("method", "lora")
    apply = cls.apply

    def picky(self: Any, model: Any, blocks: Any) -> Any:
        if len(blocks.names) < 9:
            raise InputError("the recipe", ["too few blocks"])
        return apply(self, model, blocks)

    whole = least_bytes(load_recipe(start))
    monkeypatch.setattr(cls, "apply", picky)
    assert least_bytes(load_recipe(start)) == whole


def test_code_that_fails_without_data_is_told_with_its_place(
    start: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: as in a plan."""
    cls: Any = registry.load("method", "lora")
    monkeypatch.setattr(cls, "apply", lambda *_: [][1])
    with pytest.raises(TraceFailed, match="fake tensors: IndexError in load: list index"):
        least_bytes(load_recipe(start))
