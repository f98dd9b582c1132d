"""Random weights at the speed of a copy: in a model, or in a file that quantising levers load.

Drawing eight billion normal numbers takes a CPU longer than the measurement that follows.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowres.bridges import quiet
from lowres.bridges import transformers as bridge
from lowres.bridges.kinds import auto_class, kind_of
from lowres.core.learner import LoadRequest

_TILE = 1 << 22
_HEADS = {"decoder": "causal", "encoder": "classification", "encoder_decoder": "seq2seq"}
_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


class NoRoom(Exception):
    """The disk has no room for a file of weights."""


def fill(model: nn.Module, seed: int) -> None:
    """Matrices from one tile of noise, norms 1, biases 0: as deep a model as any stays finite."""
    with torch.no_grad():
        noise = _noise(seed)
        for name, parameter in model.named_parameters():
            _copy(name, parameter.data, noise)


def fresh_model(
    request: LoadRequest, config: Any, pad_id: int, seed: int
) -> tuple[nn.Module, list[str]]:
    """As `bridges.transformers.load_model` with fresh weights: the same tensors, other values."""
    from transformers.initialization import no_init_weights

    assert request.init == "random"
    auto = auto_class(request.head, config)
    if request.head == "classification":
        config.num_labels = request.labels
    with bridge.explained(request.checkpoint, "config"), quiet.transformers(), no_init_weights():
        model = auto.from_config(
            config, attn_implementation=request.attention, dtype=getattr(torch, request.dtype)
        )
    model.tie_weights()  # what `no_init_weights` leaves out, too
    fill(model, seed)
    model.config.pad_token_id = pad_id
    model.config.use_cache = False
    return model.eval(), [name for name, _ in model.named_parameters()]


def checkpoint(source: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A folder with the configuration of `source` and random weights, written once.

    Written tensor by tensor, so that no more memory is taken than one of them needs.

    Raises:
        NoRoom: Where the disk has not a tenth more than that.
    """
    if (folder / "config.json").is_file():
        return folder
    config = bridge.load_config(str(source), None, False)
    shapes = dict(_shapes(config, dtype))
    size = sum(shape.numel() * dtype.itemsize for shape in shapes.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < 1.1 * size:
        raise NoRoom(f"weights of {size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of disk are free")
    aside = folder.with_name(f"{folder.name}.{os.getpid()}")
    aside.mkdir()
    _write(aside / "model.safetensors", shapes, dtype)
    config.dtype = dtype
    config.save_pretrained(aside)
    aside.rename(folder)
    return folder


def _shapes(config: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Size]]:
    """Of the tensors that a file of this model holds: tied ones once, no classification head."""
    head = _HEADS[kind_of(config)]
    auto = auto_class(head, config)
    with torch.device("meta"), quiet.transformers():
        model = auto.from_config(config, dtype=dtype)
    model.tie_weights()
    inside = f"{model.base_model_prefix}." if head == "classification" else ""
    for name, parameter in model.named_parameters():
        if name.startswith(inside):
            yield name, parameter.shape


def _write(path: Path, shapes: dict[str, torch.Size], dtype: torch.dtype) -> None:
    """The safetensors format: the length of a JSON header, the header, the tensors in a row."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = _noise(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = torch.empty(shape, dtype=dtype)
            _copy(name, tensor, noise)
            file.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))


def _noise(seed: int) -> torch.Tensor:
    return torch.randn(_TILE, generator=torch.Generator().manual_seed(seed)).mul_(0.02)


def _copy(name: str, tensor: torch.Tensor, noise: torch.Tensor) -> None:
    if tensor.dim() < 2:
        tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    flat = tensor.view(-1)
    for part in flat.split(_TILE):
        part.copy_(noise[: part.numel()])
