"""Files that lack what was trained, or have it under another name, do not pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowres.bridges import peft, transformers
from lowres.core.errors import GuardFailed, InputError
from lowres.making.build import build
from lowres.run.written import stop_at_lost
from tests.conftest import KINDS


def saved(one: Any, folder: Path) -> tuple[Any, dict[str, torch.Tensor], Callable[..., None]]:
    """A model with trained parameters drawn, saved; its tensors by name; and what writes others."""
    built = build(one)
    torch.manual_seed(0)
    for parameter in built.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    transformers.save(built.model, built.tokenizer, folder)
    stop_at_lost(built.model, folder)
    (file,) = folder.glob("*.safetensors")
    write = lambda tensors: save_file(tensors, file, metadata={"format": "pt"})
    return built.model, load_file(file), write


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_was_saved_otherwise_than_trained_is_named(
    method: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: one bit of one tensor, or one tensor left out."""
    model, tensors, write = saved(recipe(method=method), tmp_path)
    name = next(n for n in sorted(tensors) if "layers.1" in n)
    spoiled = tensors | {name: tensors[name].clone()}
    spoiled[name].view(-1)[-1] += 1e-3
    without = {n: t for n, t in tensors.items() if n != name}
    for wrong in (spoiled, without):
        write(wrong)
        with pytest.raises(GuardFailed, match=r"layers\.1"):
            stop_at_lost(model, tmp_path)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_was_saved_under_another_name_is_named(
    method: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: every tensor is there, bit for bit; one has another name, or two have exchanged
    theirs. Loading would pass over the first, and mistake the others."""
    model, tensors, write = saved(recipe(method=method), tmp_path)
    layers = [n for n in sorted(tensors) if "layers.1" in n and tensors[n].dim() == 2]
    shapes = [tensors[n].shape for n in layers]
    first = next(i for i, shape in enumerate(shapes) if shape in shapes[i + 1 :])
    one, other = layers[first], layers[shapes.index(shapes[first], first + 1)]
    renamed = {n.replace("layers.1", "layer.1") if n == one else n: t for n, t in tensors.items()}
    exchanged = tensors | {one: tensors[other], other: tensors[one]}
    for wrong in (renamed, exchanged):
        write(wrong)
        with pytest.raises(GuardFailed) as failure:
            stop_at_lost(model, tmp_path)
        assert one in str(failure.value)
        assert method == "full" or wrong is exchanged or ("layer.1" in str(failure.value))


@pytest.mark.parametrize("kind", KINDS)
def test_of_tied_weights_one_name_is_enough(
    kind: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: the head is the embedding and lies in the file once; without it, or where it is
    another, the check fails."""
    one = recipe(kind, method="full", objective="label_words")
    model, tensors, write = saved(one, tmp_path)
    table = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is table
    called = [n for n, p in model.named_parameters(remove_duplicate=False) if p is table]
    (name,) = [n for n in called if n in tensors]
    assert len(called) > 1
    other = next(n for n in called if n != name)
    without = {n: t for n, t in tensors.items() if n != name}
    write(without | {other: tensors[name]})
    stop_at_lost(model, tmp_path)
    for wrong in (without, tensors | {other: tensors[name] + 1}):
        write(wrong)
        with pytest.raises(GuardFailed, match=f"{name}|{other}"):
            stop_at_lost(model, tmp_path)


def test_experts_that_the_file_holds_one_by_one_are_found(tmp_path: Path) -> None:
    """Reference: transformers cuts Mixtral's experts apart and renames them when it saves them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes))
    model.save_pretrained(tmp_path)
    stop_at_lost(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    own = dict(model.named_parameters())
    cut = [name for name in tensors if name not in own and "experts" in name]
    assert len(cut) == 6, cut
    spoiled = tensors | {cut[3]: tensors[cut[3]] + 1e-3}
    for wrong in (spoiled, {n: t for n, t in tensors.items() if n != cut[3]}):
        save_file(wrong, file, metadata={"format": "pt"})
        with pytest.raises(GuardFailed, match=cut[3]):
            stop_at_lost(model, tmp_path)


@pytest.mark.parametrize("method", ["lora", "houlsby", "prompt_tuning", "adalora", "ln_tuning"])
@pytest.mark.parametrize("objective", ["label_words", "classification"])
def test_an_adapter_is_loaded_with_all_of_its_tensors_or_not_at_all(
    method: str, objective: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: one message with every name that is missing or left over, of heads made anew too;
    PEFT warns, says nothing, or fails with a key."""
    one = recipe(method=method, objective=objective)
    built = build(one)
    transformers.save(built.model, built.tokenizer, tmp_path)

    def load() -> Any:
        base = build(recipe(method="full", objective=objective)).model
        return peft.load_adapter(base, tmp_path)

    load()
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    head = [n for n in tensors if "score" in n or "classifier" in n]
    assert bool(head) == (objective == "classification")
    for name in {sorted(tensors)[0], *head}:
        wrong = {n: t for n, t in tensors.items() if n != name} | {"left.over": torch.ones(2)}
        save_file(wrong, file, metadata={"format": "pt"})
        with pytest.raises(InputError) as refusal:
            load()
        (problem,) = refusal.value.problems
        assert f"lacks 1 of {len(tensors)} tensors: {name};" in problem.text
        assert "holds 1 that no one looks for: left.over;" in problem.text
    file.unlink()
    with pytest.raises(InputError, match="no adapter_model.safetensors"):
        load()
