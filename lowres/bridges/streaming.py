"""Frozen weights in host memory that come to the device block by block, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lowres.bridges import bitsandbytes
from lowres.core import host

_MARK = "_lowres_streamed"


@dataclass
class _Slot:
    """One frozen tensor: an attribute that points to its copy on the device while that is used."""

    owner: Any
    attribute: str
    host: torch.Tensor
    device: torch.Tensor | None = None

    def point(self, to: torch.Tensor) -> None:
        setattr(self.owner, self.attribute, to)


class Streamed:
    """The blocks of one model, of which at most `resident` are on the device.

    While a block is at work the next one in its direction is copied: upwards in the forward pass,
    downwards in the backward pass and when blocks are recomputed.
    """

    def __init__(self, blocks: list[list[_Slot]], resident: int) -> None:
        self.blocks, self.resident = blocks, resident
        self._device = torch.device("cpu")
        self._at, self._direction = -1, 1
        self._there: dict[int, Any] = {}
        """Block to the event that ends its copy; None where there is nothing to wait for."""
        self._slots: dict[int, tuple[int, int]] = {}
        """Storage of a copy on the device to its block and slot."""
        self._stream: Any = None

    def tensors(self) -> Iterator[torch.Tensor]:
        """What is alive: the host's tensors and the copies of them."""
        for slot in (slot for block in self.blocks for slot in block):
            yield slot.host
            if slot.device is not None:
                yield slot.device

    def use(self, block: int, device: torch.device | None = None) -> None:
        """Have a block on the device, and the next one on its way."""
        self._device = device or self._device
        if block == self._at:
            return
        if self._at >= 0:
            self._direction = 1 if block > self._at else -1
        # Until all is there nothing is: running out of memory meanwhile begins again.
        self._at = -1
        wanted = self._neighbours(block)
        for other in [b for b in self._there if b not in wanted]:
            self._drop(other)
        for other in wanted:
            if other not in self._there:
                self._fetch(other)
        self._wait(block)
        for slot in self.blocks[block]:
            assert slot.device is not None
            slot.point(slot.device)
        self._at = block

    def pack(self, tensor: torch.Tensor) -> tuple[Any, ...] | None:
        """Where a tensor that autograd saves lies, if it lies in a copy: kept in its place."""
        if tensor.layout is not torch.strided:
            return None
        found = self._slots.get(tensor.untyped_storage()._cdata)
        if found is None:
            return None
        return (*found, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(self, place: tuple[Any, ...]) -> torch.Tensor:
        block, number, dtype, shape, stride, offset = place
        self.use(block)
        copy = self.blocks[block][number].device
        assert copy is not None and copy.dtype == dtype
        return copy.as_strided(shape, stride, offset)

    def _neighbours(self, block: int) -> list[int]:
        """The block and those that come next; behind it where there are none before it."""
        count = len(self.blocks)
        ahead = range(block + self._direction, count if self._direction > 0 else -1,
                      self._direction)  # fmt: skip
        behind = range(block - self._direction, -1 if self._direction > 0 else count,
                       -self._direction)  # fmt: skip
        return [block, *ahead, *behind][: self.resident]

    @torch.no_grad()
    def _fetch(self, block: int) -> None:
        event, cuda = None, self._device.type == "cuda"
        for slot in self.blocks[block]:
            if cuda and not slot.host.is_pinned():
                slot.host = slot.host.pin_memory()
                slot.point(slot.host)
            # Taken on the stream that computes, which alone uses the memory before and after.
            slot.device = torch.empty_like(slot.host, device=self._device)
        if cuda:
            computing = torch.cuda.current_stream(self._device)
            self._stream = self._stream or torch.cuda.Stream(self._device)
            self._stream.wait_stream(computing)
            with torch.cuda.stream(self._stream):
                self._copy(block)
                event = torch.cuda.Event()
                event.record(self._stream)
        else:
            self._copy(block)
        self._there[block] = event

    def _copy(self, block: int) -> None:
        for number, slot in enumerate(self.blocks[block]):
            assert slot.device is not None
            slot.device.copy_(slot.host, non_blocking=True)
            self._slots[slot.device.untyped_storage()._cdata] = (block, number)

    def _wait(self, block: int) -> None:
        if self._there[block] is not None:
            torch.cuda.current_stream(self._device).wait_event(self._there[block])
            self._there[block] = None

    def _drop(self, block: int) -> None:
        # A copy under way must not write into memory that is somebody else's by then.
        self._wait(block)
        del self._there[block]
        for slot in self.blocks[block]:
            assert slot.device is not None
            del self._slots[slot.device.untyped_storage()._cdata]
            slot.point(slot.host)
            slot.device = None


def stream(model: nn.Module, names: tuple[str, ...], resident: int) -> int:
    """Keep the frozen parameters of the blocks in host memory. Returns how many bytes.

    Args:
        model: The transformers model, with or without adapters.
        names: Paths of its blocks.
        resident: Blocks on the device at once.

    Raises:
        ValueError: For weights in 8 bits, which their layers hold a second time.
    """
    if getattr(model, "hf_device_map", None) is not None:
        del model.hf_device_map  # accelerate would refuse to train what was loaded elsewhere
    shared = _shared(model, names)
    found: list[tuple[nn.Module, list[_Slot]]] = []
    for name in names:
        block = model.get_submodule(name)
        frozen = {id(p): p for p in block.parameters() if not p.requires_grad}
        slots = [s for key, p in frozen.items() if key not in shared for s in _slots(p)]
        if slots:
            _stay_behind(block, frozen.keys() - shared)
            found.append((block, slots))
    streamed = Streamed([slots for _, slots in found], resident)
    kind: host.Memory = "pinned" if host.pins(torch.device("cpu")) else "pageable"
    for number, (block, slots) in enumerate(found):
        for slot in slots:
            slot.host = host.mark(slot.host.to("cpu"), kind)
            slot.point(slot.host)
        setattr(block, _MARK, streamed)
        block.forward = _streaming(block.forward, streamed, number)  # type: ignore[method-assign]
    return sum(slot.host.nbytes for _, slots in found for slot in slots)


def streamed_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """The host's tensors and their copies on the device, of a model that streams."""
    seen: set[int] = set()
    for module in model.modules():
        streamed = module.__dict__.get(_MARK)
        if streamed is not None and id(streamed) not in seen:
            seen.add(id(streamed))
            yield from streamed.tensors()


def _shared(model: nn.Module, names: tuple[str, ...]) -> set[int]:
    """Parameters that more than one block, or a block and the rest of the model, hold."""
    holders: dict[int, set[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        holder = next((n for n in names if path.startswith(n + ".")), "")
        holders.setdefault(id(parameter), set()).add(holder)
    return {key for key, blocks in holders.items() if len(blocks) > 1}


def _slots(parameter: nn.Parameter) -> Iterator[_Slot]:
    if bitsandbytes.is_eight_bit(parameter):
        raise ValueError("8-bit layers hold their weights a second time")
    yield _Slot(parameter, "data", parameter.data)
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        places = [(state, "absmax"), (state, "code")]
        if state.nested:
            places += [(state, "offset"), (state.state2, "absmax"), (state.state2, "code")]
        yield from (_Slot(owner, name, getattr(owner, name)) for owner, name in places)


def _stay_behind(block: nn.Module, frozen: set[int]) -> None:
    """Moving or converting the model leaves these parameters of the block alone."""

    def apply(fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        held = [
            (module._parameters, name, parameter)
            for module in block.modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in frozen
        ]
        for parameters, name, _ in held:
            parameters[name] = None
        try:
            type(block)._apply(block, fn, recurse)
        finally:
            for parameters, name, parameter in held:
                parameters[name] = parameter
        return block

    block._apply = apply  # type: ignore[assignment]


def _streaming(forward: Callable[..., Any], streamed: Streamed, number: int) -> Callable[..., Any]:
    """A block's forward with its weights on the device, and again when gradients come back."""

    def called_back(_: torch.Tensor) -> None:
        streamed.use(number)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = _first((*args, *kwargs.values()))
        streamed.use(number, None if given is None else given.device)
        # What is saved beside goes to the hooks around this block: recomputing blocks has some.
        around = torch._C._autograd._top_saved_tensors_default_hooks(True)
        keep, give = around or (_itself, _itself)

        def pack(tensor: torch.Tensor) -> tuple[bool, Any]:
            place = streamed.pack(tensor)
            return (True, place) if place is not None else (False, keep(tensor))

        def unpack(packed: tuple[bool, Any]) -> torch.Tensor:
            streams, value = packed
            out: torch.Tensor = streamed.unpack(value) if streams else give(value)
            return out

        with saved_tensors_hooks(pack, unpack):
            out = forward(*args, **kwargs)
        made = _first(out if isinstance(out, list | tuple) else (out,))
        if made is not None and made.requires_grad:
            # Not every layer saves its weights where hooks see them: 4-bit ones do not.
            made.register_hook(called_back)  # type: ignore[no-untyped-call]
        return out

    return run


def _itself(value: Any) -> Any:
    return value


def _first(values: Any) -> torch.Tensor | None:
    return next((v for v in values if isinstance(v, torch.Tensor)), None)
