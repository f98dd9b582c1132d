"""Models without weights: what transformers, PEFT and torch need to be told when tensors are fake.

Everything here is active only inside `rehearsing()`; a run never sees it.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from lowres.bridges import peft, quiet, stand_ins
from lowres.bridges import transformers as bridge
from lowres.bridges.kinds import auto_class

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.learner import Head, LoadRequest


@contextlib.contextmanager
def rehearsing() -> Iterator[None]:
    """Let the libraries treat fake tensors as tensors, and leave no trace of it: neither random
    numbers drawn nor warnings. Enter it before a tracer.

    transformers takes the path of an export when it sees one (it writes attention masks out that a
    run never has); PyTorch swaps parameters of fake tensors in a way that PEFT's references forbid.
    """
    import torch
    from torch import nn
    from transformers.utils import import_utils

    peft.preload()
    stand_ins.prepare()
    with (
        mock.patch.object(import_utils, "is_fake_tensor", lambda _: False),
        mock.patch.object(nn.Module, "_apply", _apply),
        stand_ins.unpacked_as_real(),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of fake tensors, and of a CPU in place of a GPU
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
    request: LoadRequest,
    config: Any,
    pad_id: int,
    seed: int,
    later: list[Callable[[], None]] | None = None,
) -> tuple[nn.Module, list[str]]:
    """As `transformers.load_model`, without reading weights.

    Call it where new tensors are fake, else it takes the memory of the model.

    Args:
        later: Takes the function that gives the model its memory, to be called when parts of it
            have been left out; None does it at once.
    """
    import torch

    from lowres.bridges import narrow

    auto = auto_class(request.head, config)
    if request.head == "classification":
        config.num_labels = request.labels
    torch.manual_seed(seed)
    stored = getattr(config, "dtype", None)  # from_config writes the type asked for there
    pretrained = request.init == "pretrained"
    place = torch.device("meta") if pretrained else contextlib.nullcontext()
    with bridge.explained(request.checkpoint, "config"), quiet.transformers(), place:
        model = auto.from_config(
            config, attn_implementation=request.attention, dtype=getattr(torch, request.dtype),
            trust_remote_code=request.trust_remote_code,
        )  # fmt: skip
    if pretrained:
        quantisation = request.options.get("quantization_config")
        if quantisation is not None:
            stand_ins.replace_linear(model, quantisation)
        model.tie_weights()
        wanted = getattr(torch, request.dtype)
        stored = _stored_dtype(request.checkpoint) or stored or wanted
        narrow.settle(model, request.matrices, request.dtype, _fresh(request, model))
        fill = functools.partial(_materialise, model, stored, wanted, quantisation is not None)
        if later is None:
            fill()
        else:
            later.append(fill)
        if quantisation is not None:
            from lowres.bridges import bitsandbytes

            bitsandbytes.settle(model)
            model.is_loaded_in_4bit = bool(quantisation.load_in_4bit)
            model.is_loaded_in_8bit = bool(quantisation.load_in_8bit)
    model.config.pad_token_id = pad_id
    model.config.use_cache = False
    if pretrained:
        return model.eval(), _fresh(request, model)
    fresh = [name for name, _ in model.named_parameters()]
    narrow.settle(model, request.matrices, request.dtype, fresh)
    return model.eval(), fresh


def _materialise(
    model: nn.Module, stored: torch.dtype, wanted: torch.dtype, quantised: bool
) -> None:
    """Give parameters and buffers memory, one after the other, as reading a checkpoint does.

    Args:
        stored: What the file holds them in; each is converted to `wanted` as it is read.
        quantised: Pack those of quantised layers, too.
    """
    import torch
    from torch import nn

    def real(tensor: torch.Tensor) -> torch.Tensor:
        # Integers are real in a trace and may be used as positions, so they need a value.
        make = torch.empty if tensor.is_floating_point() else torch.zeros
        return make(tensor.shape, dtype=tensor.dtype, device="cpu")

    # What transformers holds in 32 bits although 16 were asked for.
    wide: Mapping[str, Any] = getattr(model, "_get_dtype_plan", lambda _: {})(wanted)
    made: dict[int, nn.Parameter] = {}
    owners = dict(model.named_modules())
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        path, _, own = name.rpartition(".")
        dtype = torch.float32 if any(part in name for part in wide) else wanted
        if parameter.element_size() < dtype.itemsize:
            dtype = parameter.dtype  # a matrix that is held in fewer bits than the rest
        read = torch.empty(parameter.shape, dtype=stored) if stored != dtype else None
        value = torch.empty(parameter.shape, dtype=dtype)
        del read
        if quantised and stand_ins.is_quantised(owners[path], own):
            made[id(parameter)] = stand_ins.pack(owners[path], value)
        else:
            made[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
        del value
    for module in model.modules():
        for name, held in module._parameters.items():
            if held is not None:
                module._parameters[name] = made[id(held)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = real(buffer)
                real(buffer)  # its value is computed beside it


def _fresh(request: LoadRequest, model: Any) -> list[str]:
    """What the checkpoint does not hold: of these, only a classification head may be made anew.

    Where the weights are not at hand, all outside of the base model is taken to be missing.
    """
    if request.head != "classification":
        return []
    inside = model.base_model_prefix + "."
    stored = _stored_shapes(request.checkpoint)
    if not stored:
        return [name for name, _ in model.named_parameters() if not name.startswith(inside)]
    stored |= _renamed(stored, model)

    def held(name: str, parameter: torch.Tensor) -> bool:
        for known in (name, name.removeprefix(inside), inside + name):
            if known in stored:
                # A head over other classes; within the base model quantisation changes shapes.
                return name.startswith(inside) or stored[known] == tuple(parameter.shape)
        # Files of older versions name the parameters of norms otherwise.
        return name.endswith(("LayerNorm.weight", "LayerNorm.bias"))

    return [name for name, parameter in model.named_parameters() if not held(name, parameter)]


def _renamed(stored: dict[str, tuple[int, ...]], model: Any) -> dict[str, tuple[int, ...]]:
    """Names in a file as transformers' loading changes them to the model's (ViT's layers)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    others = [change for change in changes if not isinstance(change, WeightRenaming)]
    return {rename_source_key(n, renamings, others)[0]: shape for n, shape in stored.items()}


def _stored_shapes(checkpoint: str) -> dict[str, tuple[int, ...]]:
    """What the safetensors headers of a local checkpoint name; nothing where there are none."""
    return {
        name: tuple(file.get_slice(name).get_shape())
        for file in _files(checkpoint)
        for name in file.keys()
    }


def _stored_dtype(checkpoint: str) -> torch.dtype | None:
    """What a local checkpoint holds its first matrix in; None where it is not at hand."""
    import torch

    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    for file in _files(checkpoint):
        for name in file.keys():
            if len(file.get_slice(name).get_shape()) > 1:
                return kinds.get(file.get_slice(name).get_dtype())
    return None


def _files(checkpoint: str) -> Iterator[Any]:
    """The opened safetensors files of a local checkpoint."""
    from safetensors import safe_open

    found = bridge.resolve(checkpoint)
    if not found.is_hub:
        for path in sorted(Path(found.location).glob("*.safetensors")):
            with bridge.explained(checkpoint, "weights"):
                opened = safe_open(path, framework="numpy")
            with opened as file:
                yield file


def versions() -> dict[str, str]:
    """Of the libraries whose code a plan traces."""
    from importlib.metadata import version

    return {name: version(name) for name in ("transformers", "peft", "accelerate", "bitsandbytes")}


def has_fused_attention(config: Any, head: Head) -> bool:
    """Whether transformers has the model with torch's fused attention."""
    auto = auto_class(head, config)
    cls = auto._model_mapping[type(config)]
    return bool(getattr(cls[0] if isinstance(cls, tuple) else cls, "_supports_sdpa", False))
