"""The feed-forward part in tiles: where it is found, that nothing changes, what it saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowres
from lowres.core.errors import InputError
from lowres.levers.tiled_mlp import tiled
from lowres.making.build import build
from lowres.memory import device as devices
from lowres.memory.live import LiveBytes, tensors_of
from lowres.planning.plan import plan
from tests.conftest import awaken
from tests.planning.conftest import config_folder, planned_recipe
from tests.updates import SMOOTH, compare, peak_bytes

__all__ = ["config_folder", "planned_recipe"]

TILED = [{"name": "tiled_mlp", "tiles": 3}]
TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi3": {},
    "gemma2": {"head_dim": 4, "query_pre_attn_scalar": 8},
    "gpt_neox": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "n_inner": 96},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer_maker: Any) -> Callable[..., str]:
    """A folder with a tiny decoder of a type."""

    def make(model_type: str, **changes: Any) -> str:
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes: dict[str, Any] = {
            "hidden_size": 16, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2,
        }  # fmt: skip
        if model_type == "gpt2":
            sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2}
        config = AutoConfig.for_model(
            model_type, vocab_size=640, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            max_position_embeddings=64, **{**sizes, **changes},
        )  # fmt: skip
        torch.manual_seed(0)
        folder: Path = tmp_path_factory.mktemp(model_type)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        awaken(folder)
        tokenizer_maker().save_pretrained(folder)
        return str(folder)

    return make


@pytest.mark.parametrize("method", ["full", {"name": "lora", "targets": "all-linear"}])
@pytest.mark.parametrize("model_type", TYPES)
def test_it_is_found_by_structure_and_changes_no_update(
    model_type: str, method: Any, made: Callable[..., str], recipe: Callable[..., Any]
) -> None:
    """Reference: the recipe without the lever; lower peaks. Gated and plain, two layers in one,
    transposed matrices, attention narrower than the model, adapters around the layers."""
    model = {"checkpoint": made(model_type, **TYPES[model_type]), "attention": "eager"}
    make = lambda levers: recipe(
        model=model, levers=levers, method=method, optimizer=SMOOTH, objective="label_words"
    )
    compare(make([]), make(TILED))
    assert peak_bytes(make(TILED)) < peak_bytes(make([]))


@pytest.mark.parametrize("rows", [(7,), (2, 5), (3, 4)])
def test_a_tiled_function_is_the_function(rows: tuple[int, ...]) -> None:
    """Reference: a linear layer on all tokens; shapes, values and gradients, also where the tiles
    are uneven or more than the tokens."""
    layer, hidden = torch.nn.Linear(6, 8), torch.randn(*rows, 6, requires_grad=True)
    for tiles in (1, 3, 100):
        found = tiled(layer, tiles)(hidden)
        assert torch.allclose(found, layer(hidden), atol=1e-6)
        ours, theirs = (torch.autograd.grad(x.sin().sum(), [hidden, layer.weight])
                        for x in (found, layer(hidden)))  # fmt: skip
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", ["encoder", "encoder_decoder"])
def test_the_wide_activations_are_not_kept(kind: str, recipe: Callable[..., Any]) -> None:
    """Closed form: what the forward pass leaves alive falls by at least one wide activation,
    (B x T, F) in four bytes, for each block."""
    alive = []
    for levers in ([], TILED):
        built = build(recipe(kind, levers=levers, method="lora"))
        built.model.train()
        batch = built.collator(built.train_rows[:4])
        with LiveBytes("cpu", tensors_of(built.model)) as counted:
            before = counted.now_bytes
            logits = built.learner.logits(batch)
            alive.append(counted.now_bytes - before)
        del logits
    if kind == "encoder":
        assert alive[0] - alive[1] >= 3 * batch["input_ids"].numel() * 32 * 4
    assert alive[1] < alive[0]


@pytest.mark.parametrize("kind", ["encoder", "encoder_decoder"])
def test_planned_bytes_are_measured_bytes(
    kind: str, recipe: Callable[..., Any], in_folder: Any
) -> None:
    """Reference: a real run; steps and evaluation to the byte."""
    record = lowres.run(recipe(kind, levers=TILED, method="lora"), quiet=True)
    assert record.plan is not None, record.events
    for phase in ("first_step", "steady_steps", "evaluate"):
        planned = record.plan["phases"][phase]["live_bytes"]
        assert planned == record.measured.phases[phase].live_bytes, phase  # type: ignore[index]


@pytest.mark.slow
def test_a_plan_of_four_blocks_is_that_of_all(planned_recipe: Callable[..., Any]) -> None:
    """Reference: the plan with every block traced; and the peak of a card is lower than without."""
    wide, loop = {"intermediate_size": 640}, {"max_length": 256}
    recipe, card = planned_recipe(wide, levers=TILED, loop=loop), devices.generic(8.0)
    short, whole = plan(recipe, card), plan(recipe, card, exact=True)
    assert "4 of 9" in short.depth
    assert short.needed_bytes == pytest.approx(whole.needed_bytes, rel=0.01)
    plain = plan(planned_recipe(wide, loop=loop), card)
    fall = plain.phases["steady_steps"].live_bytes - short.phases["steady_steps"].live_bytes
    # Of nine blocks at least the input of the downward layer, in two bytes.
    assert fall > 8 * 256 * 640 * 2


class TestRefused:
    """Behaviour: the sentence says where, why, and what works."""

    def test_no_module_of_its_own(self, recipe: Callable[..., Any]) -> None:
        with pytest.raises(InputError, match="no modules that are a feed-forward.*checkpointing"):
            build(recipe(levers=TILED))

    def test_dropout(self, made: Callable[..., str], recipe: Callable[..., Any]) -> None:
        adapted = {"name": "lora", "targets": "all-linear", "dropout": 0.1}
        for model_type, method in (("llama", adapted), ("gpt2", "full")):
            checkpoint = {"checkpoint": made(model_type)}
            with pytest.raises(InputError, match="dropout inside.*set it to 0"):
                build(recipe(model=checkpoint, levers=TILED, method=method))

    def test_experts(self, made: Callable[..., str], recipe: Callable[..., Any]) -> None:
        mixtral = {"checkpoint": made("mixtral", num_local_experts=2)}
        with pytest.raises(InputError, match="mixture of experts"):
            build(recipe(model=mixtral, levers=TILED))
