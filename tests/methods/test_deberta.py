"""Methods of the attention and of the feed-forward part on DeBERTa-v2, whose projections have names
of their own, and whose queries and keys may serve the relative positions, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowres.bridges.blocks import map_blocks
from lowres.core import registry
from lowres.core.errors import InputError
from tests.conftest import sample_part

METHODS = (
    "attn_scale", "compacter", "houlsby", "ia3", "ladder", "loretta_adp", "lorta", "sparse_adapter",
    "ssb", "ssl",
)  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "shared": {"relative_attention": True, "share_att_key": True},
    "own": {"relative_attention": True},
    "absolute": {"relative_attention": False},
}
"""How relative positions are attended to: by the layers of the tokens, by their own, or not."""
FIELDS: dict[tuple[str, str], dict[str, Any]] = {
    ("attn_scale", "own"): {"scales": ["query", "key", "value"]}
}
IDS = torch.arange(5, 25).view(2, 10)


def deberta(head: str, form: str) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.DebertaV2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, hidden_dropout_prob=0,
        attention_probs_dropout_prob=0, pos_att_type=["p2c", "c2p"], **FORMS[form],
    )  # fmt: skip
    return getattr(transformers, f"DebertaV2For{head}")(config).eval()


def adapted(method: str, head: str, form: str, **fields: Any) -> tuple[Any, Any]:
    cls: Any = registry.load("method", method)
    keys = {k: v for k, v in sample_part("method", method).items() if k != "name"}
    one = cls(**keys | FIELDS.get((method, form), {}) | fields)
    model = deberta(head, form)
    heads = ["classifier"] if head == "SequenceClassification" else []
    return one, one.apply(model, map_blocks(model, heads, may_have_new_head=bool(heads)))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head", ["SequenceClassification", "MaskedLM"])
@pytest.mark.parametrize("method", METHODS)
def test_it_starts_as_the_base_trains_and_ends(method: str, head: str, form: str) -> None:
    """Reference: the plain model's logits, bit for bit, at the start and switched off; unmerged
    logits after merging, to float32's rounding. Behaviour: three updates move what is trained."""
    if method == "ladder" and form != "absolute":
        with pytest.raises(InputError, match="relative positions, as wide as the model"):
            adapted(method, head, form)
        return
    one, model = adapted(method, head, form)
    plain = logits(deberta(head, form))
    assert torch.equal(logits(model), plain) == one.starts_as_base
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model.train()
    for _ in range(3):
        model(input_ids=IDS).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(model.get_parameter(n), p) for n, p in trained.items())
    after = logits(model)
    assert torch.isfinite(after).all() and not torch.equal(after, plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    if one.mergeable:
        assert torch.allclose(logits(one.merge(model)), after, atol=1e-5)


def test_a_map_is_not_scaled_where_half_of_it_has_other_queries() -> None:
    """Behaviour."""
    with pytest.raises(InputError, match=r"'map': the queries of relative positions.*leave it out"):
        adapted("attn_scale", "MaskedLM", "own", scales=["map"])


@pytest.mark.parametrize("method", ["mam", "prefix_tuning", "s4", "unipelt"])
def test_prefixes_are_refused_where_no_attention_takes_them(method: str) -> None:
    """Behaviour: there is no other implementation that one could choose."""
    with pytest.raises(InputError, match="no attention but its own.*use a method without them"):
        adapted(method, "MaskedLM", "own")
