"""Tiny checkpoints of each model kind, made once a session, and recipes over them."""

from __future__ import annotations

import atexit
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("LOWRES_DATA", str(ROOT.parent / "shared" / "data"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What tests keep for later runs is theirs alone.
os.environ["LOWRES_CACHE"] = tempfile.mkdtemp(prefix="lowres-tests-")
atexit.register(shutil.rmtree, os.environ["LOWRES_CACHE"], ignore_errors=True)
# Threads that spin while they wait make two processes on two cores many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Runs in processes of their own add sums up as those in this one do, on any number of cores.
os.environ["OMP_NUM_THREADS"] = "2"

KINDS = ("decoder", "encoder", "encoder_decoder")
# OPT's blocks hold their two layers themselves; in this decoder the feed-forward part is a module.
GATED = "gated_decoder"
# What the models below have no place for, by method, kind and objective (None: any), and words of
# the reason. All else is to work.
NO_PLACE: dict[tuple[str, str, str | None], str] = {
    ("bitfit", "encoder_decoder", None): "has no bias",  # T5 is made without
    # T5 makes its decoder's input of the row's ids where a whole row is one class.
    ("p_tuning", "encoder_decoder", "classification"): "makes its decoder's input of the ids",
    ("prompt_tuning", "encoder_decoder", "classification"): "makes its decoder's input of the ids",
}
SPECIAL = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]


def sampled(*axes: Sequence[Any], every: int) -> list[Any]:
    """All combinations as parameters. One in `every` is in the fast suite, chosen so that each
    value of an axis is among them; the others carry the slow marker."""
    made = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [axis[place] for axis, place in zip(axes, places, strict=True)]
        marks = [pytest.mark.slow] if sum(places) % every else []
        made.append(pytest.param(*values, marks=marks))
    return made


def no_place(method: str, kind: str, objective: str) -> str | None:
    """Words of the reason why a method finds no place in a model of these tests; None: it does."""
    return NO_PLACE.get((method, kind, None)) or NO_PLACE.get((method, kind, objective))


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    """Sums add up in another order with another number, which a run in this process may set."""
    import torch

    if torch.get_num_threads() != 2:
        torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tokenizer_maker() -> Callable[..., Any]:
    """A byte-level BPE tokenizer over the embedded grammar's words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from lowres.core import registry

    task = registry.load("task", "grammaticality")()
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [e.text for e in task.examples("train")[:1500]] + [" Yes No great terrible ?"] * 2000
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )

    def make(**changes: Any) -> Any:
        names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>",
                 "mask_token": "<mask>", "unk_token": "<unk>"} | changes  # fmt: skip
        named = {k: v for k, v in names.items() if v is not None}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **named)

    return make


def tiny_config(kind: str) -> Any:
    from transformers import BertConfig, LlamaConfig, OPTConfig, T5Config

    vocab = 640
    if kind == GATED:
        return LlamaConfig(
            vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
            attention_bias=True, mlp_bias=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
    if kind == "decoder":
        return OPTConfig(
            vocab_size=vocab, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32,
            num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=64,
            dropout=0.0, attention_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
    if kind == "encoder":
        return BertConfig(
            vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=64, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, pad_token_id=0,
        )  # fmt: skip
    return T5Config(
        vocab_size=vocab, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip


@pytest.fixture(scope="session")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_maker: Callable[..., Any]
) -> dict[str, Path]:
    """Kind to a folder with random weights, small enough for a step in milliseconds."""
    import torch
    from transformers import (
        BertForMaskedLM,
        LlamaForCausalLM,
        OPTForCausalLM,
        T5ForConditionalGeneration,
    )

    classes = {
        "decoder": OPTForCausalLM,
        GATED: LlamaForCausalLM,
        "encoder": BertForMaskedLM,
        "encoder_decoder": T5ForConditionalGeneration,
    }
    out = {}
    for kind, cls in classes.items():
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(kind)
        cls(tiny_config(kind)).save_pretrained(folder)
        tokenizer_maker().save_pretrained(folder)
        out[kind] = folder
    return out


def awaken(folder: Path) -> None:
    """Give matrices in blocks a deviation that neither quenches nor swells what passes through. At
    0.02, that of wide models, a block of width 16 adds next to nothing, and its gradients are lost
    beside those of the head."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        if value.ndim == 2 and re.search(r"\.(layers?|block|h)\.\d", name):
            value *= value.shape[1] ** -0.5 / float(value.std())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def awake(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The checkpoints with blocks whose gradients are not lost in rounding."""
    made = {}
    for kind, plain in checkpoints.items():
        made[kind] = tmp_path_factory.mktemp("awake") / kind
        shutil.copytree(plain, made[kind])
        awaken(made[kind])
    return made


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory, tokenizer_maker: Callable[..., Any]) -> Path:
    """A Llama of two blocks whose weights are large enough, 1 MiB, for DeepSpeed to lay on a disk:
    all matrices in float32, those of 1032 x 512 in bfloat16 too."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=640, hidden_size=512, intermediate_size=1032, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wide")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer_maker().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def raw_recipe(checkpoints: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """The keys of a small valid recipe; keyword arguments replace sections."""

    def make(kind: str = "decoder", **changes: Any) -> dict[str, Any]:
        loop = {
            "steps": 4, "micro_batch_size": 4, "global_batch_size": 8, "max_length": 32,
            "eval_batch_size": 16,
        } | changes.pop("loop", {})  # fmt: skip
        return {
            "model": {"checkpoint": str(checkpoints[kind])} | changes.pop("model", {}),
            "task": {"name": "grammaticality", "train_examples": 48, "eval_examples": 16},
            "method": "full",
            "objective": "classification",
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "loop": loop,
        } | changes

    return make


@pytest.fixture(scope="session")
def recipe(raw_recipe: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """A small valid Recipe; see `raw_recipe`."""
    from lowres.core.reading import load_recipe

    return lambda kind="decoder", **changes: load_recipe(raw_recipe(kind, **changes))


def sample_part(family: str, name: str) -> dict[str, Any]:
    """The recipe keys of a part, with what it declares for fields without a default."""
    from lowres.core import registry

    return {"name": name, **registry.load(family, name).sample_fields}


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, so that `runs/` lands in it."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
