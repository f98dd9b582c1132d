"""Methods on a vision transformer, and what refuses one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowres
from lowres.core import registry
from lowres.core.errors import InputError, OutOfTime
from lowres.core.example import all_tokens, collate, real_tokens
from lowres.making.build import build
from tests.conftest import sample_part

pytest.importorskip("sklearn")

WIDTH, BLOCKS, HEADS, TOKENS = 16, 3, 2, 5
OWN_FIELDS: dict[str, dict[str, Any]] = {
    "attn_scale": {"offsets": True},
    "houlsby": {"reduction": 4},
}
# An image has no ids of tokens, and no embeddings are looked up in whose place vectors could stand.
REFUSED = {
    "aot_p_tuning": "no embedding of token ids",
    "p_tuning": "takes no embeddings of tokens",
    "prompt_tuning": "takes no embeddings of tokens",
}
METHODS = [name for name in registry.names("method") if name not in REFUSED]
# Those whose papers are about images, and one of each class; the others are for the slow suite.
FAST = ("attn_scale", "bitfit", "boft", "full", "houlsby", "ln_tuning", "lora", "oft", "sara")


def fields_of(method: str) -> dict[str, Any]:
    return sample_part("method", method) | OWN_FIELDS.get(method, {})


def each(*left_out: str) -> Any:
    """Every method that works on images."""
    marked = [
        pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])
        for name in METHODS
        if name not in left_out
    ]
    return pytest.mark.parametrize("method", marked)


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer with random weights and a head of two classes."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=WIDTH, intermediate_size=32,
        num_hidden_layers=BLOCKS, num_attention_heads=HEADS, num_labels=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vit")
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def raw(raw_recipe: Callable[..., Any], vit: Path) -> Callable[..., Any]:
    """The keys of a recipe over the vision transformer."""

    def make(method: str = "attn_scale", **changes: Any) -> Any:
        task = {"name": "digits", "train_examples": 48, "eval_examples": 16}
        sections = {"task": task, "model": {"checkpoint": str(vit)}} | changes
        return raw_recipe(method=fields_of(method), **sections)

    return make


@pytest.fixture
def make(raw: Callable[..., Any]) -> Callable[..., Any]:
    """A recipe over the vision transformer, and what is built from it."""
    from lowres.core.reading import load_recipe

    def made(method: str = "attn_scale", **changes: Any) -> tuple[Any, Any]:
        one = load_recipe(raw(method, **changes))
        return one, build(one)

    return made


def batch_of(built: Any) -> Any:
    return built.collator(built.train_rows[:8])


def logits(built: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = built.learner.logits(batch_of(built))
    return out


def train(one: Any, built: Any, steps: int = 3) -> list[float]:
    batch, losses = batch_of(built), []
    for group in built.optimizer.param_groups:
        group["lr"] = 1e-2
    built.model.train()
    for _ in range(steps):
        loss = one.objective.loss(built.learner, batch) / one.objective.targets(batch)
        loss.backward()
        built.optimizer.step()
        built.optimizer.zero_grad()
        losses.append(loss.item())
    built.model.eval()  # gates of diff_pruning are drawn in training
    return losses


def test_the_suite_has_methods() -> None:
    """Behaviour: each of the registry is tested here or refused, and each name is a method's."""
    assert sorted([*METHODS, *REFUSED]) == registry.names("method")
    assert OWN_FIELDS.keys() | set(FAST) <= set(METHODS)


@pytest.mark.parametrize(("method", "why"), REFUSED.items())
def test_what_is_made_for_token_ids_refuses_images(method: str, why: str, make: Any) -> None:
    """Behaviour: with its reason."""
    with pytest.raises(InputError, match=why):
        make(method)


def test_a_batch_of_images_is_what_the_model_reads(make: Callable[..., Any]) -> None:
    """Reference: the example's own bytes; four patches and the class token of each image."""
    one, built = make()
    batch, rows = batch_of(built), built.train_rows[:8]
    assert set(batch) == {"pixel_values", "attention_mask", "labels"}
    assert batch["pixel_values"].shape == (8, 1, 8, 8)
    for image, row in zip(batch["pixel_values"], rows, strict=True):
        assert row.image is not None and row.length == TOKENS
        assert (image * 255).round().flatten().tolist() == list(row.image.pixels)
    assert real_tokens(batch) == all_tokens(batch) == 8 * TOKENS
    assert torch.equal(collate(rows[:1], 0)["pixel_values"][0], batch["pixel_values"][0])
    # transformers' own loss is the mean of ours: any other loop may train it.
    own = built.model(**batch).loss
    assert torch.allclose(own, one.objective.loss(built.learner, batch) / 8)


@each()
def test_it_starts_as_the_base_and_moves_only_what_it_trains(method: str, make: Any) -> None:
    """Reference: the plain model with the same new head, bit for bit, but where the method declares
    that it starts elsewhere; after updates, itself."""
    one, built = make(method)
    _, plain = make("full")
    assert torch.equal(logits(built), logits(plain)) == one.method.starts_as_base
    before = {n: p.detach().clone() for n, p in built.model.named_parameters()}
    losses = train(one, built, 10)
    assert losses[-1] < losses[0]
    for name, parameter in built.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert (
        method == "full"
        or not built.model.get_parameter(
            next(n for n in before if n.endswith("embeddings.cls_token"))
        ).requires_grad
    )
    # The checkpoint has two classes: a head of ten is made anew and trained.
    assert all(p.requires_grad for n, p in built.model.named_parameters() if "classifier" in n
               and "original_module" not in n)  # fmt: skip


@each()
def test_a_saved_result_loads(method: str, make: Any, tmp_path: Path) -> None:
    """Reference: the trained model in memory. Equal bit for bit; no tokenizer is written."""
    from lowres.bridges import transformers

    one, built = make(method)
    train(one, built)
    transformers.save(built.model, built.tokenizer, tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*token*"))
    _, fresh = make("full")
    if (tmp_path / "saved" / "adapter_config.json").exists():
        from peft import PeftModel

        loaded: Any = PeftModel.from_pretrained(fresh.model, tmp_path / "saved")
    else:
        loaded = type(fresh.model).from_pretrained(tmp_path / "saved")
    fresh.learner.module = fresh.learner.base = loaded.eval()
    assert torch.equal(logits(fresh), logits(built))


@each("full")
def test_merged_equals_unmerged(method: str, make: Any) -> None:
    """Reference: unmerged logits. Tolerance: float32 rounding of folded weights."""
    one, built = make(method)
    if not one.method.mergeable:
        pytest.skip("the method declares that it cannot be merged")
    train(one, built)
    before = logits(built)
    built.learner.module = built.learner.base = one.method.merge(built.model)
    assert torch.allclose(logits(built), before, atol=1e-5)


def test_the_trained_of_attn_scale_are_counted(make: Callable[..., Any]) -> None:
    """Closed form: 3 d + H factors and 2 d offsets a block, and the head."""
    _, built = make("attn_scale")
    trained = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    assert trained == BLOCKS * (3 * WIDTH + HEADS + 2 * WIDTH) + 10 * WIDTH + 10


def test_freezing_leaves_the_lower_blocks_alone(make: Callable[..., Any]) -> None:
    """Behaviour: only the last block has factors."""
    _, built = make("attn_scale", freezing={"name": "prefix", "frozen": BLOCKS - 1})
    trained = [n for n, p in built.model.named_parameters() if p.requires_grad]
    assert trained and all(f"layers.{BLOCKS - 1}." in n or "classifier" in n for n in trained)


@pytest.mark.parametrize(
    "lever", ["gradient_checkpointing", "tiled_mlp", "length_bucketing", "frozen_offload"]
)
def test_exact_levers_change_no_gradient(lever: str, make: Callable[..., Any]) -> None:
    """Reference: the gradients without it."""
    found = []
    for levers in ([], [lever]):
        one, built = make("attn_scale", levers=levers)
        one.objective.loss(built.learner, batch_of(built)).backward()
        found.append({n: p.grad for n, p in built.model.named_parameters() if p.requires_grad})
    for (name, plain), other in zip(found[0].items(), found[1].values(), strict=True):
        assert torch.allclose(plain, other, atol=1e-6), name


def test_a_bfloat16_and_a_4_bit_model_train(make: Callable[..., Any], vit: Path) -> None:
    """Behaviour: pixels are cast to the model's type, and every factor gets a gradient."""
    for dtype, levers in (("bfloat16", []), ("float32", ["nf4_weights"])):
        one, built = make(
            "attn_scale", model={"checkpoint": str(vit), "dtype": dtype}, levers=levers
        )
        one.objective.loss(built.learner, batch_of(built)).backward()
        for name, parameter in built.model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_run_that_was_stopped_resumes_as_one_without_a_break(
    raw: Callable[..., Any], tmp_path: Path
) -> None:
    """Reference: the uninterrupted run; equal losses and scores."""
    keys = raw("attn_scale", loop={"steps": 5, "save_every": 2})
    whole = lowres.run(
        lowres.load_recipe(keys), output_folder=tmp_path / "whole", quiet=True, plan=False
    )
    assert whole.outcome == "ok"
    assert {s.split for s in whole.scores} == {"in_domain", "out_of_domain"}
    with pytest.raises(OutOfTime):
        late = lowres.load_recipe(keys | {"budget": {"minutes": 1e-6}})
        lowres.run(late, output_folder=tmp_path / "cut", quiet=True, plan=False)
    rest = lowres.run(
        lowres.load_recipe(keys),
        output_folder=tmp_path / "cut",
        resume="latest",
        quiet=True,
        plan=False,
    )
    assert rest.losses == whole.losses
    assert [s.value for s in rest.scores] == [s.value for s in whole.scores]


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_it_is_planned_from_its_configuration_and_data(
    init: str, make: Callable[..., Any], vit: Path
) -> None:
    """Behaviour: every operation is known; the parameters are those of the model."""
    from lowres.memory import device
    from lowres.planning.plan import plan

    one, built = make("attn_scale", model={"checkpoint": str(vit), "init": init})
    found = plan(one, device.load("cpu"))
    assert not found.unknown and "the data" in found.shapes
    assert found.trainable == sum(p.numel() for p in built.model.parameters() if p.requires_grad)


def test_it_is_planned_without_the_images(make: Callable[..., Any]) -> None:
    """Reference: the batches of the data; an image is as large wherever it comes from."""
    from lowres.planning.assumed import assumed_inputs

    one, built = make("attn_scale")
    assumed = assumed_inputs(one).data.train
    assert [row.length for row in assumed] == [TOKENS] * one.loop.global_batch_size
    shapes = [{k: v.shape for k, v in collate(rows[:8], 0).items()}
              for rows in (assumed, built.train_rows)]  # fmt: skip
    assert shapes[0] == shapes[1]


def test_a_search_over_lengths_is_refused(vit: Path) -> None:
    """Behaviour: an image's tokens are the model's."""
    from lowres.memory import device
    from lowres.recommend.fit import fit

    with pytest.raises(InputError, match="reads images"):
        fit(str(vit), None, device.load("rtx-4090"))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"objective": "label_words"}, "is a\\(n\\) vision"),
        ({"task": {"name": "grammaticality", "train_examples": 8}}, "reads images"),
        ({"loop": {"max_length": 4}}, "less than the 5 tokens"),
        ({"levers": ["sequence_packing"]}, "asks for something of each row"),
        ({"levers": ["chunked_logits"]}, "no logits over a vocabulary"),
        (
            {"levers": ["frozen_prefix_cache"], "freezing": {"name": "prefix", "frozen": 1}},
            "images have none",
        ),
    ],
)
def test_what_is_for_text_is_refused(changes: Any, why: str, make: Callable[..., Any]) -> None:
    """Behaviour: a sentence, before or while the model is prepared."""
    with pytest.raises(InputError, match=why):
        make("attn_scale", **changes)


def test_images_of_another_size_are_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    """Behaviour: both sizes are named."""
    from transformers import ViTConfig

    ViTConfig(image_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="1 x 8 x 8 .* reads 3 x 32 x 32"):
        make("attn_scale", model={"checkpoint": str(tmp_path), "init": "random"},
             loop={"max_length": 512})  # fmt: skip


def test_a_text_model_reads_the_drawing(recipe: Callable[..., Any]) -> None:
    """Behaviour: the task serves both kinds."""
    built = build(recipe("encoder", task={"name": "digits", "train_examples": 8}))
    assert all(row.image is None and row.inputs["input_ids"] for row in built.train_rows)
