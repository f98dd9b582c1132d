"""Models without weights: what transformers, PEFT and torch need to be told when tensors are fake.

Everything here is active only inside `rehearsing()`; a run never sees it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from lowres.bridges import transformers as bridge
from lowres.core.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.learner import LoadRequest


@contextlib.contextmanager
def rehearsing() -> Iterator[None]:
    """Let the libraries treat fake tensors as tensors.

    transformers takes the path of an export when it sees one (it writes attention masks out that a
    run never has); PyTorch swaps parameters of fake tensors in a way that PEFT's references forbid.
    """
    from torch import nn
    from transformers.utils import import_utils

    with (
        mock.patch.object(import_utils, "is_fake_tensor", lambda _: False),
        mock.patch.object(nn.Module, "_apply", _apply),
    ):
        yield


def _apply(
    self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> Any:
    """`Module._apply` that puts a converted parameter in place of the old one."""
    import torch
    from torch import nn

    if recurse:
        for child in self.children():
            child._apply(fn)
    for name, parameter in self._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            converted = fn(parameter)
        if converted is not parameter:
            self._parameters[name] = nn.Parameter(converted, parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self


def load_shapes(
    request: LoadRequest, config: Any, pad_id: int, seed: int
) -> tuple[nn.Module, list[str]]:
    """As `transformers.load_model`, without reading weights.

    Call it where new tensors are fake, else it takes the memory of the model.
    """
    import torch
    import transformers

    auto = getattr(transformers, bridge._AUTO[request.head])
    if request.head == "classification":
        config.num_labels = request.labels
    torch.manual_seed(seed)
    with bridge._explained(request.checkpoint), bridge._quiet(), _without_values():
        model = auto.from_config(
            config, attn_implementation=request.attention, dtype=getattr(torch, request.dtype),
            trust_remote_code=request.trust_remote_code,
        )  # fmt: skip
    model.config.pad_token_id = pad_id
    model.config.use_cache = False
    names = [name for name, _ in model.named_parameters()]
    fresh = names if request.init == "random" else _fresh(request, model, names)
    return model.eval(), fresh


@contextlib.contextmanager
def _without_values() -> Iterator[None]:
    """Weights that will be replaced by a checkpoint's need no random values first."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


def _fresh(request: LoadRequest, model: Any, names: list[str]) -> list[str]:
    """What the checkpoint does not hold: only a classification head may be missing."""
    if request.head != "classification":
        return []
    inside = model.base_model_prefix + "."
    return [name for name in names if not name.startswith(inside)]


def stand_in_tokenizer(vocabulary: int, words: tuple[str, ...], longest: int, typed: bool) -> Any:
    """A tokenizer for planning where the checkpoint's is not at hand: one token a word.

    Args:
        vocabulary: Rows of the model's embedding table.
        words: Words that must be tokens of their own (label words).
        longest: Its `model_max_length`.
        typed: Whether rows carry `token_type_ids`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]
    kept = [*special, *dict.fromkeys(w.strip() for w in words), "word"]
    if vocabulary < len(kept):
        raise InputError("the recipe", [f"a vocabulary of {vocabulary} is too small to plan for"])
    table = {word: i for i, word in enumerate(kept)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=longest, pad_token="<pad>", bos_token="<s>",
        eos_token="</s>", mask_token="<mask>", unk_token="<unk>",
        model_input_names=["input_ids", *(["token_type_ids"] if typed else []), "attention_mask"],
    )  # fmt: skip


def has_tokenizer(checkpoint: str) -> bool:
    """Whether a tokenizer can be expected there: a folder may hold a configuration alone."""
    found = bridge.resolve(checkpoint)
    names = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
    return found.is_hub or any((Path(found.location) / name).is_file() for name in names)


def versions() -> dict[str, str]:
    """Of the libraries whose code a plan traces."""
    from importlib.metadata import version

    return {name: version(name) for name in ("transformers", "peft", "accelerate", "bitsandbytes")}


def missing_pad_token(checkpoint: str) -> str | None:
    """A token to pad with, where the checkpoint's tokenizer is at hand and names none."""
    found = bridge.resolve(checkpoint)
    if found.is_hub or not has_tokenizer(checkpoint):
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(found.location)
    return None if tokenizer.pad_token is not None else tokenizer.eos_token or tokenizer.unk_token
