"""What stands in for values that do not exist in a trace.

A fake number read as a Python number is 1, a fake truth value False. Positions chosen among n
(argmax, top-k: routing, greedy decoding) go round n evenly from the middle on, so experts are used
in balance and no generated token is the first or the last of the vocabulary. No input has outlier
columns (LLM.int8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

LARGEST_REAL_ELEMENTS = 1 << 20
"""Integer tensors above this are fake too: a trace must not need the memory it predicts."""

aten = torch.ops.aten
CHOOSING = {
    aten.argmax.default, aten.argmin.default, aten.topk.default, aten.max.dim, aten.min.dim,
    aten.sort.default, aten.sort.stable, aten.argsort.default, aten.multinomial.default,
}  # fmt: skip
"""Operations whose integer results are positions among the elements of one dimension."""


class UncopiedMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A mode that is not copied with the tensors that refer to it.

    Copying a tensor copies what it refers to, and two copies of a mode's weak references to
    storages release each of them twice (bitsandbytes copies the states of its optimizers).
    """

    def __deepcopy__(self, memo: Any) -> UncopiedMode:
        return self


def is_list_of_tensors(x: Any) -> bool:
    return isinstance(x, list | tuple) and bool(x) and isinstance(x[0], torch.Tensor)


def stand_in_value(dtype: torch.dtype) -> float | int | bool:
    if dtype is torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1


def must_stay_fake(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and (
        too_large(x) or (x.is_floating_point() and x.numel() > 1)
    )


def too_large(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.numel() > LARGEST_REAL_ELEMENTS


def as_positions(indices: Any) -> list[Any]:
    """Real masks as positions: how many they choose is then known."""
    out: list[Any] = []
    for index in indices:
        real = isinstance(index, torch.Tensor) and not isinstance(index, FakeTensor)
        if real and index.dtype is torch.bool:
            with unset_fake_temporarily():
                out += index.nonzero(as_tuple=True)
        else:
            out.append(index)
    return out


def dimension(func: Any, args: Any, kwargs: Any) -> int:
    """Which dimension a choosing operation runs over."""
    if func in (aten.topk.default, aten.multinomial.default):
        at = 2
    else:
        at = 1
    chosen = kwargs.get("dim", args[at] if len(args) > at else -1)
    return chosen if isinstance(chosen, int) and not isinstance(chosen, bool) else -1


def round_robin(fake: torch.Tensor, size: int) -> torch.Tensor:
    if fake.is_floating_point() or fake.numel() > LARGEST_REAL_ELEMENTS:
        return fake
    with unset_fake_temporarily():
        steps = torch.arange(fake.numel(), dtype=fake.dtype) + size // 2
        return (steps % max(1, size)).view(fake.shape)


def _quantised_rows(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with unset_fake_temporarily():
        columns = torch.empty(0, dtype=torch.int64)
    rows = x.numel() // x.shape[-1]
    return torch.empty_like(x, dtype=torch.int8), torch.empty(rows, dtype=torch.float32), columns


def _product(x: torch.Tensor, _: Any, weight: torch.Tensor, *__: Any) -> tuple[torch.Tensor, Any]:
    out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype)
    return out, torch.empty(0, dtype=x.dtype)


WITHOUT_OUTLIERS: dict[str, Callable[..., Any]] = {
    "bitsandbytes.int8_vectorwise_quant.default": _quantised_rows,
    "bitsandbytes.int8_mixed_scaled_mm.default": _product,
}
"""Results of operations that would look for outlier columns."""


def on_meta(tensors: Iterable[torch.Tensor], kwargs: Any) -> bool:
    """A model that is still to be given memory."""
    device = kwargs.get("device")
    asked = device is not None and torch.device(device).type == "meta"
    return asked or any(t.device.type == "meta" for t in tensors)
