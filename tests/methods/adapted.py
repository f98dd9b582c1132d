"""Tiny models with random weights and an adapter of lowres beside them, through plain PEFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowres.making.build import build
from lowres.making.gradients import micro_batches


def llama(**changes: Any) -> Any:
    """Two blocks, four heads over two of keys and values, no biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    } | changes  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def gpt2() -> Any:
    """Two blocks, queries, keys and values in one transposed layer with a bias."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def opt() -> Any:
    """Two blocks with biases that are not zero."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=50, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model: Any = OPTForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def falcon() -> Any:
    """Two blocks that add to the output of their last layer in place."""
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    config = FalconConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    return FalconForCausalLM(config).eval()


def adapted(model: nn.Module, method: str, **settings: Any) -> Any:
    import peft

    from lowres.bridges.peft_tuner import DeltaConfig

    return peft.get_peft_model(model, DeltaConfig(method=method, settings=settings))  # type: ignore


def moved(model: Any, seed: int = 1) -> Any:
    """The model with other values in all that is trained."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
            parameter.data.add_(noise, alpha=0.3)
    return model


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        made: torch.Tensor = model(input_ids=ids).logits
    return made


def deltas(model: nn.Module) -> dict[str, Any]:
    """Path of the adapted module to its one delta."""
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "lowres_delta_parts") and "base_layer" in module._modules:
            (delta,) = module.lowres_delta_parts["default"].values()
            found[path.removeprefix("base_model.model.")] = delta
    return found


def kept_bytes(function: Any, *inputs: torch.Tensor) -> int:
    """Bytes of distinct storages that backward holds, parameters and views of them apart."""
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # A product keeps its weight turned.
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = function(*inputs)
    assert made.requires_grad
    return sum(kept.values())


def far_gradients(one: Any) -> tuple[Any, list[torch.Tensor | None]]:
    """What is built of a recipe, and the gradients of a batch far from where it starts."""
    built = build(one)
    torch.manual_seed(0)
    for parameter in built.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    built.model.train()
    (batch,) = micro_batches(one, built.learner, built.train_rows[:4], 4)
    one.objective.loss(built.learner, batch).backward()
    return built, [p.grad for p in built.model.parameters() if p.requires_grad]


def all_move(one: Any) -> Any:
    """What is built of a recipe, after two updates in which each trained parameter moved."""
    built = build(one)
    before = {n: p.detach().clone() for n, p in built.model.named_parameters() if p.requires_grad}
    built.model.train()
    for _ in range(2):
        (batch,) = micro_batches(one, built.learner, built.train_rows[:4], 4)
        one.objective.loss(built.learner, batch).backward()
        built.optimizer.step()
        built.optimizer.zero_grad()
    assert before
    for name, start in before.items():
        assert not torch.equal(built.model.get_parameter(name), start), name
    return built
