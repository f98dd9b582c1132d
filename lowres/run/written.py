"""Whether what was trained lies in the files that were written, where loading looks for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from lowres.bridges import adapter_files, transformers
from lowres.core.errors import GuardFailed, some
from lowres.run.checksums import checksum

Content = tuple[tuple[int, ...], torch.dtype, int]
Named = Sequence[tuple[str, nn.Parameter]]


def stop_at_lost(
    model: nn.Module, folder: Path, trained: Iterable[tuple[str, nn.Parameter]] | None = None
) -> None:
    """Raise GuardFailed when a trained tensor is not in a folder's safetensors, bit for bit, under
    the name by which it is looked for when the folder is loaded.

    An adapter's file must have the names that PEFT looks for, all of them and no others. Of tied
    weights, which are one tensor, a whole model's files need one name.

    Args:
        trained: With their names; None for those that the model says to be trained now.
    """
    if trained is None:
        trained = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
    ours = [(name, p) for name, p in trained if p.numel()]
    found: dict[str, Content] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                found[name] = _content(opened.get_tensor(name))
    adapter = (folder / "adapter_config.json").exists()
    lost = list((_lost_of_adapter if adapter else _lost_of_whole)(model, folder, found, ours))
    if lost:
        raise GuardFailed(
            f"{some(lost)} of the trained parameters are not in {folder} as they were trained; "
            "loading it would give another model than the one that was scored"
        )


def _lost_of_adapter(
    model: nn.Module, folder: Path, found: Mapping[str, Content], ours: Named
) -> Iterator[str]:
    """Raises GuardFailed for other names than PEFT's."""
    # Asked for first: where parameters are divided, making prompts to write divides theirs again.
    trained = [(name, _content(parameter)) for name, parameter in ours]
    written = adapter_files.as_written(model)
    problem = adapter_files.other_names(written, found)
    if problem is not None:
        raise GuardFailed(f"{folder} {problem}; loading it would give another model than this")
    yield from (name for name, tensor in written.items() if found[name] != _content(tensor))
    contents = set(found.values())
    yield from (name for name, content in trained if content not in contents)


def _lost_of_whole(
    model: nn.Module, folder: Path, found: Mapping[str, Content], ours: Named
) -> Iterator[str]:
    own = {_place(tensor) for tensor in model.state_dict().values()}
    wanted = {_place(parameter): name for name, parameter in ours}
    made_anew = False
    names: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    tensors: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
    for name, tensor in transformers.as_written(model).items():
        place = _place(tensor)
        # What is no tensor of the model was joined or cut for the file, maybe from trained ones.
        made_anew |= place not in own
        if place in wanted or place not in own:
            names.setdefault(place, []).append(name)
            tensors[place] = tensor
    for place, called in names.items():
        there = [name for name in called if name in found]
        yield from () if there else [" or ".join(called)]
        content = _content(tensors[place]) if there else None
        yield from (name for name in there if found[name] != content)
    if not made_anew:
        yield from (name for place, name in wanted.items() if place not in names)


def _place(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """The same for all names of one tensor."""
    return tensor.data_ptr(), tuple(tensor.shape)


def _content(tensor: torch.Tensor) -> Content:
    return tuple(tensor.shape), tensor.dtype, checksum(tensor)
