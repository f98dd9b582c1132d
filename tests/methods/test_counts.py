"""Trained parameters against the head-to-head of Scaling Down to Scale Up (arXiv 2303.15647).

The counts are those of the study's own notebook (https://github.com/Guitaricet/peft_comparison), on
three sizes of T5, found here from each configuration without weights.
"""

from __future__ import annotations

from typing import Any

import pytest

from lowres.core import registry
from lowres.core.learner import Kind
from tests.conftest import KINDS, sample_part, sampled, tiny_config

MODELS = {
    "t5-large": {"num_heads": 16, "d_kv": 64, "d_ff": 4096},
    "t5-3b": {"num_heads": 32, "d_kv": 128, "d_ff": 16384},
    "t5-11b": {"num_heads": 128, "d_kv": 128, "d_ff": 65536},
}
"""What the sizes differ in; each has 24 blocks of width 1024 on either side."""
COUNTS: dict[str, tuple[str, dict[str, Any], tuple[str | None, str | None, str | None]]] = {
    "houlsby": ("houlsby", {}, ("12.687M", "12.687M", "12.687M")),
    "pfeiffer": ("pfeiffer", {}, ("6.344M", "6.344M", "6.344M")),
    "scaled_parallel": ("scaled_parallel", {}, ("50.405M", "50.405M", "50.405M")),
    "ln_tuning": ("ln_tuning", {}, ("124928", "124928", "124928")),
    "lora": ("lora", {"targets": "paper"}, ("2.359M", "5.898M", "20.054M")),
    "lora, all": ("lora", {"targets": "all-linear"}, ("8.651M", "25.166M", "91.226M")),
    "krona": ("krona", {}, (".2212M", ".4055M", ".7741M")),
    "compacter": ("compacter", {}, (".3042M", ".3042M", ".3042M")),
    "compacter++": ("compacter_pp", {}, (".1521M", ".1521M", ".1521M")),
    "ia3": ("ia3", {}, ("344064", "1.376M", "5.505M")),
    "mam": ("mam", {}, ("171.07M", "525.4M", None)),
    "prefix": ("prefix_tuning", {}, ("77.31M", "304.2M", "1212M")),
    "prefix, flat": ("prefix_tuning", {"mlp": None}, ("4.424M", "17.69M", "70.78M")),
    "unipelt": ("unipelt", {}, ("86.22M", "316.7M", "1239M")),
    # Added by the authors after their figures were printed: 20 vectors as wide as the model.
    "prompt": ("prompt_tuning", {}, (f"{20 * 1024}",) * 3),
}
"""Name in the study to method, settings where they are not the method's own, and counts as printed;
None where no figure was published."""

ROWS = [
    pytest.param(model, method, settings, printed, id=f"{name}-{model}")
    for name, (method, settings, counts) in COUNTS.items()
    for model, printed in zip(MODELS, counts, strict=True)
    if printed is not None
]


def config_of(model: str) -> Any:
    from transformers import T5Config

    return T5Config(vocab_size=32128, d_model=1024, num_layers=24, **MODELS[model])


def within(printed: str) -> tuple[float, float]:
    """A count as printed and one unit of its last digit."""
    if not printed.endswith("M"):
        return float(printed), 0.0
    digits = printed.removesuffix("M")
    return float(digits) * 1e6, 1e6 * 10.0 ** -len(digits.partition(".")[2])


def test_every_method_of_the_study_is_there() -> None:
    """Behaviour: a row without a method is not counted below."""
    assert {method for method, _, _ in COUNTS.values()} <= set(registry.names("method"))


@pytest.mark.parametrize("model, method, settings, printed", ROWS)
def test_a_method_trains_as_much_as_in_the_study(
    model: str, method: str, settings: dict[str, Any], printed: str
) -> None:
    """Reference: the published count, to one unit of its last printed digit; closed form where the
    study has none."""
    from lowres.planning.counts import counts

    cls: Any = registry.load("method", method)
    found = counts(cls(**settings), config_of(model)).trainable
    wanted, unit = within(printed)
    assert abs(found - wanted) <= unit, found


@pytest.mark.parametrize(
    ("family", "sizes", "count"),
    [
        # A block: queries, keys, values, output, two norms and the last layer d each, one of 4 d.
        ("gpt2", {"n_embd": 768, "n_layer": 12}, 12 * 11 * 768 + 768),
        ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, 24 * 11 * 1024 + 1024),
        # Beside the blocks: the norm of the embeddings, and of the head for masked words a layer, a
        # norm and one for each word.
        ("bert", {"hidden_size": 768, "num_hidden_layers": 12}, 12 * 11 * 768 + 3 * 768 + 30522),
        ("bert", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                  "intermediate_size": 4096}, 24 * 11 * 1024 + 3 * 1024 + 30522),
    ],
)  # fmt: skip
def test_bitfit_trains_every_bias(family: str, sizes: dict[str, Any], count: int) -> None:
    """Closed form, from the configuration alone, at published sizes."""
    from transformers import BertConfig, GPT2Config

    from lowres.planning.counts import counts

    config = {"gpt2": GPT2Config, "bert": BertConfig}[family](**sizes)
    cls: Any = registry.load("method", "bitfit")
    assert counts(cls(), config).trainable == count


@pytest.mark.parametrize("model", MODELS)
def test_bitfit_has_nothing_to_train_in_t5(model: str) -> None:
    """Behaviour: its layers and norms have no biases, and what is called a bias of its attention is
    a table of relative positions. Refused, with what has some."""
    from lowres.core.errors import InputError
    from lowres.planning.counts import counts

    cls: Any = registry.load("method", "bitfit")
    with pytest.raises(InputError, match="has no bias.*use lora, or a model with biases"):
        counts(cls(), config_of(model))


def test_there_are_rows() -> None:
    """Behaviour: the study's 15 methods on three models, but for the one figure that it lacks."""
    assert len(COUNTS) == 15
    assert len(ROWS) == 15 * 3 - 1


@pytest.mark.parametrize(("method", "kind"), sampled(registry.names("method"), KINDS, every=3))
def test_a_count_from_shapes_is_that_of_the_model(method: str, kind: Kind, recipe: Any) -> None:
    """Reference: parameters that require a gradient in a model that was built and has weights."""
    from lowres.core.errors import InputError, LowresError
    from lowres.making.build import build
    from lowres.planning.counts import counts

    objective = "label_words"
    try:
        one = recipe(kind, method=sample_part("method", method), objective=objective)
        built = build(one)
    except InputError:
        with pytest.raises(InputError):
            counts(recipe(kind, method=sample_part("method", method), objective=objective).method,
                   tiny_config(kind))  # fmt: skip
        return
    try:
        found = counts(one.method, built.model.config)
    except LowresError as error:
        # What the weights' values choose cannot be counted without them, and is refused.
        assert "depends on data" in str(error), error
        return
    trained = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    assert found.trainable == trained
    plain = build(recipe(kind, objective=objective)).model
    assert found.model == sum(p.numel() for p in plain.parameters())


SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "pad_token_id": 0,
}  # fmt: skip
UNLISTED: dict[str, tuple[str, dict[str, Any], int]] = {
    "Phi3": ("ForCausalLM", SIZES | {"num_key_value_heads": 2}, 2 * 8 * (32 + 64)),
    "ModernBert": (
        "ForMaskedLM",
        SIZES | {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
        2 * 8 * (32 + 96),
    ),
    "DistilBert": (
        "ForMaskedLM",
        {"vocab_size": 60, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
        2 * 2 * 8 * (32 + 32),
    ),
    # The decoder's blocks have two attentions each.
    "UMT5": (
        "ForConditionalGeneration",
        {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        (2 + 2 * 2) * 2 * 8 * (32 + 32),
    ),
    "ViT": (
        "ForImageClassification",
        {n: SIZES[n] for n in SIZES if n not in ("vocab_size", "pad_token_id")},
        2 * 2 * 8 * (32 + 32),
    ),
}
"""Architectures that PEFT's table of queries and values lacks, and LoRA's parameters at rank 8."""


@pytest.mark.parametrize("name", UNLISTED)
def test_queries_and_values_that_peft_does_not_list_are_found(name: str) -> None:
    """Closed form: r (inputs + outputs) of each query and value, or of the layer that makes both;
    from the configuration, and in a model with weights."""
    import transformers

    from lowres.bridges.blocks import map_blocks
    from lowres.planning.counts import counts

    head, sizes, count = UNLISTED[name]
    config = getattr(transformers, f"{name}Config")(**sizes)
    lora: Any = registry.load("method", "lora")()
    assert lora.targets == "paper"
    assert counts(lora, config).trainable == count
    model = getattr(transformers, name + head)(config)
    adapted = lora.apply(model, map_blocks(model))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == count


def test_queries_and_values_that_nobody_knows_are_refused() -> None:
    """Behaviour: with what to do."""
    from transformers import MambaConfig

    from lowres.core.errors import InputError
    from lowres.planning.counts import counts

    lora: Any = registry.load("method", "lora")()
    config = MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(InputError, match="values of a 'mamba' is not known; name them, or use all"):
        counts(lora, config)


def test_a_freezing_takes_blocks_out_of_the_count() -> None:
    """Closed form: LoRA in half of the blocks has half of the parameters."""
    from lowres.planning.counts import counts

    config, lora = tiny_config("decoder"), registry.load("method", "lora")()
    prefix: Any = registry.load("freezing", "prefix")
    half: Any = prefix(frozen=config.num_hidden_layers - 1)
    counted: Any = lora
    assert (
        config.num_hidden_layers * counts(counted, config, half).trainable
        == counts(counted, config).trainable
    )
