"""Rows picked by token ids: matrices written out, the ids of each stack, tables, levers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowres.bridges.blocks import map_blocks
from lowres.core import registry
from lowres.core.errors import LowresError
from lowres.making.build import build
from lowres.making.gradients import micro_batches
from lowres.methods._by_token import TokenIds, TokenRows, fuse
from tests.conftest import KINDS
from tests.methods.adapted import all_move, far_gradients
from tests.methods.test_prefixes import logits, plain, rows

FORMS = ("embeddings", "kronecker")
FAMILIES = (*KINDS, "gpt2", "llama")


def adapted(family: str, form: str, only: int | None = None) -> tuple[Any, Any]:
    """A model with factors far from zero, and the deltas of its blocks by their path."""
    model = plain(family)
    blocks = map_blocks(model)
    if only is not None:
        blocks = blocks.only(blocks.names[only : only + 1], train_stem=False)
    method = registry.load("method", "aot_p_tuning")(form=form, rank=3)
    out = method.apply(model, blocks).double().eval()
    torch.manual_seed(2)
    found = {n: m for n, m in out.named_modules() if isinstance(m, TokenRows)}
    for delta in found.values():
        for parameter in delta.parameters():
            nn.init.normal_(parameter)
    assert list(found) and len(found) == len(blocks.trained)
    by_block = {n.partition("base_model.model.")[2].partition(".lowres")[0]: m
                for n, m in found.items()}  # fmt: skip
    return out, by_block


def written_out(delta: Any, form: str, embeddings: torch.Tensor) -> torch.Tensor:
    """P of the two equations, (V, D)."""
    if form == "kronecker":
        return (torch.kron(delta.left, delta.middle) @ delta.right)[: len(embeddings)].detach()
    inner, outer = delta.inner, delta.outer
    hidden = F.gelu(embeddings @ inner.weight.T + inner.bias)
    return (hidden @ outer.weight.T + outer.bias).detach()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_block_takes_the_rows_of_its_matrix(family: str, form: str) -> None:
    """Reference: the plain model, with rows of the matrix written out added by hand to what enters
    each block; encoder and decoder are given other tokens."""
    model, deltas = adapted(family, form)
    inputs = rows(family)
    found = logits(model, **inputs)
    reference = plain(family)
    embeddings = reference.get_input_embeddings().weight
    for path, delta in deltas.items():
        decodes = family == "encoder_decoder" and path.startswith("decoder")
        ids = inputs["decoder_input_ids" if decodes else "input_ids"]
        added = written_out(delta, form, embeddings)[ids]

        def add(_: Any, args: Any, others: Any, added: Any = added) -> Any:
            if args:
                return (args[0] + added, *args[1:]), others
            return args, others | {"hidden_states": others["hidden_states"] + added}

        reference.get_submodule(path).register_forward_pre_hook(add, with_kwargs=True)
    assert torch.allclose(found, logits(reference, **inputs), atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_the_first_block_are_another_embedding_table(form: str) -> None:
    """Reference: a plain model whose embedding table is E + P; nothing lies between the two."""
    model, deltas = adapted("llama", form, only=0)
    reference = plain("llama")
    embeddings = reference.get_input_embeddings().weight
    (delta,) = deltas.values()
    embeddings.data += written_out(delta, form, embeddings)
    inputs = rows("llama")
    assert torch.allclose(logits(model, **inputs), logits(reference, **inputs), atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tables_answer_as_the_factors(family: str, form: str, tmp_path: Path) -> None:
    """Reference: the adapter before; saved and loaded, too, without the model's embeddings."""
    from peft import PeftModel
    from safetensors.torch import load_file

    model, deltas = adapted(family, form)
    inputs = rows(family)
    before = logits(model, **inputs)
    embeddings = model.get_input_embeddings().weight
    wanted = [written_out(delta, form, embeddings) for delta in deltas.values()]
    fuse(model)
    for delta, table in zip(deltas.values(), wanted, strict=True):
        assert [n for n, _ in delta.named_parameters()] == ["table"]
        assert torch.allclose(delta.table, table, atol=1e-12)
    assert torch.allclose(logits(model, **inputs), before, atol=1e-10)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(deltas)
    for low in (False, True):
        again: Any = PeftModel.from_pretrained(plain(family), tmp_path, low_cpu_mem_usage=low)
        assert torch.allclose(logits(again.double(), **inputs), before, atol=1e-6)


def test_another_token_changes_its_own_row_alone() -> None:
    """Behaviour: what is added at other positions stays."""
    _, deltas = adapted("encoder", "kronecker")
    delta = next(iter(deltas.values()))
    inputs = rows("encoder")
    found = []
    for token in (5, 6):
        inputs["input_ids"][0, 2] = token
        found.append(delta.rows(inputs["input_ids"], None))
    differs = (found[0] != found[1]).any(-1)
    assert differs[0, 2] and differs.sum() == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "encoder_decoder"])
def test_nothing_of_a_pass_is_left_behind(family: str, form: str) -> None:
    """Behaviour: ids and embeddings would take memory until the next pass."""
    model, deltas = adapted(family, form)
    seen = []
    for delta in deltas.values():
        inner = delta.rows
        delta.rows = lambda ids, embedded, inner=inner: seen.append(ids) or inner(ids, embedded)
    logits(model, **rows(family))
    assert len(seen) == len(deltas) and all(ids is not None for ids in seen)
    assert all(d.tap.ids is None and d.tap.embedded is None for d in deltas.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "encoder_decoder"])
def test_generating_with_a_cache_equals_generating_without(family: str, form: str) -> None:
    """Reference: whole passes; with a cache only the new token's ids arrive."""
    model, _ = adapted(family, form)
    inputs = rows(family)
    inputs.pop("decoder_input_ids", None)
    fixed = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached, whole = (model.generate(**inputs, **fixed, use_cache=on) for on in (True, False))
    assert torch.equal(cached, whole)


@pytest.mark.parametrize("form, vocabulary, width", [("embeddings", 64, 16), ("kronecker", 64, 16)])
def test_counts(form: str, vocabulary: int, width: int) -> None:
    """Closed form: 2 r d + r + d a block; (a + b) r + r r d with a b of at least V."""
    _, deltas = adapted("llama", form)
    side = 9  # The smallest b with b b > 64, and a = ceil(64 / 9) = 8.
    wanted = 2 * 3 * width + 3 + width
    if form == "kronecker":
        wanted = (side + 8) * 3 + 9 * width
    assert all(sum(p.numel() for p in d.parameters()) == wanted for d in deltas.values())


def test_embeddings_as_input_are_refused() -> None:
    """Behaviour: there are no ids to pick rows by."""
    model, _ = adapted("llama", "embeddings")
    with pytest.raises(LowresError, match="token ids"):
        model(inputs_embeds=torch.zeros(1, 7, 16).double())


LEVERS: dict[str, Any] = {
    "gradient_checkpointing": "gradient_checkpointing", "tiled_mlp": "tiled_mlp",
    "frozen_offload": "frozen_offload", "activation_offload": "activation_offload",
    "every second": {"name": "gradient_checkpointing", "every": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lever", LEVERS)
@pytest.mark.parametrize("frozen", [0, 1])
def test_levers_that_reach_into_blocks_change_no_gradient(
    lever: str, kind: str, frozen: int, recipe: Callable[..., Any]
) -> None:
    """Reference: the recipe without the lever; the blocks are inside of what adds the rows."""
    if lever == "tiled_mlp" and kind == "decoder":
        pytest.skip("OPT's feed-forward part is no module of its own")
    found = []
    freezing: Any = {"name": "prefix", "frozen": frozen} if frozen else "none"
    for levers in ([], [LEVERS[lever]]):
        one = recipe(kind, method="aot_p_tuning", objective="label_words", freezing=freezing,
                     levers=levers)  # fmt: skip
        built, gradients = far_gradients(one)
        found.append(gradients)
    assert len(found[0]) == 4 * (len(built.learner.blocks.names) - frozen)
    for plain_one, pulled in zip(*found, strict=True):
        assert plain_one.any() and torch.allclose(plain_one, pulled, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["encoder", "encoder_decoder"])
def test_the_feed_forward_part_inside_is_tiled(kind: str, recipe: Callable[..., Any]) -> None:
    """Behaviour: the lever takes hold of the block that the rows are added before."""
    one = recipe(kind, method="aot_p_tuning", objective="label_words", levers=["tiled_mlp"])
    built = build(one)
    ends = (".intermediate.dense", ".wi")
    wide = next(m for n, m in built.model.named_modules() if n.endswith(ends))
    seen: list[torch.Size] = []
    wide.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    (batch,) = micro_batches(one, built.learner, built.train_rows[:4], 4)
    with torch.no_grad():
        built.learner.logits(batch)
    assert len(seen) == 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_over_four_bits(kind: str, form: str, recipe: Callable[..., Any]) -> None:
    """Behaviour: every trained parameter moves."""
    method = {"name": "aot_p_tuning", "form": form, "rank": 4}
    one = recipe(kind, method=method, objective="label_words", levers=["nf4_weights"])
    built = all_move(one)
    assert any(isinstance(m, TokenIds) for m in built.model.modules())


@pytest.mark.parametrize(("form", "rank"), [("embeddings", 128), ("kronecker", 20)])
def test_each_form_has_the_papers_rank_unless_another_is_given(form: str, rank: int) -> None:
    """Closed form: the inner width of either; the Kronecker form's outer matrix has rank^2 rows."""
    model = plain("llama")
    blocks = map_blocks(model)
    out = registry.load("method", "aot_p_tuning")(form=form).apply(model, blocks)
    found = [m for m in out.modules() if isinstance(m, TokenRows)]
    assert len(found) == len(blocks.trained)
    for delta in found:
        rows = delta.inner.out_features if form == "embeddings" else delta.right.shape[0] ** 0.5
        assert rows == rank
