"""What a training step allocates, recorded from the step's own code without data or device.

Floating-point tensors are fake: they have shapes, storages and gradients, but no memory. Integer
tensors stay real, so that code which looks at ids, masks or positions takes the path of the real
run. Where a decision would need a fake tensor's value, a rule of `values` answers.

Source: FakeTensorMode, https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from lowres.core import host
from lowres.core.errors import NotPlanned
from lowres.memory.trace import OUTSIDE, Birth, Cost, Trace
from lowres.memory.values import (
    CHOOSING,
    LARGEST_REAL_ELEMENTS,
    WITHOUT_OUTLIERS,
    UncopiedMode,
    as_positions,
    dimension,
    is_list_of_tensors,
    must_stay_fake,
    on_meta,
    round_robin,
    stand_in_value,
    too_large,
)
from lowres.memory.work import cost_of, handled_bytes, over_bus

aten = torch.ops.aten
_KNOWN = {"aten", "prim", "prims", "profiler", "bitsandbytes"}
"""Namespaces of operations whose kernels are covered by rules or take nothing beside results."""


class TraceFailed(NotPlanned):
    """The recipe's code did something that has no answer without data."""


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record while the block runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = UncopiedMode(allow_non_fake_inputs=True)
        self.trace = Trace()
        self.place = OUTSIDE
        self.stage = ""
        self.modules: list[str] = []
        self.recording = True
        self.costing = False
        self._latest_place = OUTSIDE
        self.after_operation: Callable[[Any, Any, Any], None] | None = None
        self._numbers: dict[int, int] = {}
        self._watches: dict[int, Any] = {}
        self._serving: dict[int, int] = {}

    def enter(self, stage: str) -> None:
        """Another part of the step begins; nothing is at work yet."""
        self.stage, self.place = stage, OUTSIDE
        self.modules.clear()

    def mark(self, name: str) -> None:
        """A phase or stage begins."""
        self.trace.marks.append((name, len(self.trace.tensors)))

    def hold(self, tensors: Iterable[tuple[torch.Tensor, int, str, str]]) -> None:
        """Count tensors that exist already: (tensor, place, module path, category)."""
        for tensor, place, module, category in tensors:
            self._note(tensor, "", place, module, category)

    def number(self, tensor: torch.Tensor) -> int | None:
        """The number of a tensor's storage in the trace."""
        return self._numbers.get(tensor.untyped_storage()._cdata)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Births in here are not recorded; deaths of recorded tensors are."""
        before, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = before

    def workspace(self, size_bytes: int, operation: str) -> None:
        """Memory that an operation takes and gives back inside."""
        self._died(self._born(size_bytes, self.place, operation, 0, "workspaces"), size_bytes)

    def permanent(self, size_bytes: int, operation: str) -> None:
        """What a library takes and keeps."""
        self._born(size_bytes, OUTSIDE, operation, 0, "workspaces")

    def cost(self, kind: str, dtype: torch.dtype, flops: int, moved_bytes: int) -> None:
        """Work of a kernel that no operation of the trace stands for."""
        if self.costing:
            self.trace.costs.append(Cost(self.place, self.stage, kind, dtype, flops, moved_bytes))

    def start_anew(self) -> Trace:
        """The trace so far; a new one begins, in which nothing is alive yet."""
        self.close()
        (done, self.trace) = (self.trace, Trace())
        return done

    def close(self) -> None:
        """Stop watching; deaths from now on are not events."""
        self.trace.settle()
        for held in (self._watches, self._numbers, self._serving):
            held.clear()

    # What torch calls.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            tensor = args[0]
            return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return stand_in_value(args[0].dtype)
        out = self._run(func, types, args, kwargs)
        if self.recording:
            if func is aten.copy_.default and host.allocating():
                # A buffer on the host belongs to the block that it serves.
                self._serving[self.number(args[0]) or 0] = self._place_by(args[1:], None)
            self._note_all(func, args, out)
            if self.costing:
                self._cost(func, args, kwargs, out)
            if host.allocating():
                return out  # The host has no workspaces on the device.
            if func.namespace not in _KNOWN:
                self._unknown(func, args, kwargs, out)
            if self.after_operation is not None:
                self.after_operation(func, args, out)
        return out

    def _run(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        flat, _ = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        if any(isinstance(t, FakeTensor) for t in tensors):
            return self._run_fake(func, types, args, kwargs)
        if on_meta(tensors, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if not tensors:
            out = self.fake.__torch_dispatch__(func, types, args, kwargs)
            if any(must_stay_fake(x) for x in tree_leaves(out)):
                return out
        elif sum(t.numel() for t in tensors) * max(1, len(tensors)) > LARGEST_REAL_ELEMENTS:
            return self._run_fake(func, types, args, kwargs)
        elif max(t.dim() for t in tensors) + len(tensors) > 2 and "_" != func._opname[-1:]:
            # Broadcasting may make a large tensor of small ones: look before making it.
            with contextlib.suppress(DataDependentOutputException, DynamicOutputShapeException):
                out = self.fake.__torch_dispatch__(func, types, args, kwargs)
                if any(too_large(x) for x in tree_leaves(out)):
                    return out
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _run_fake(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], as_positions(args[1]), *args[2:])
        if str(func) in WITHOUT_OUTLIERS:
            with self.fake:
                return WITHOUT_OUTLIERS[str(func)](*args)
        try:
            out = self.fake.__torch_dispatch__(func, types, args, kwargs)
        except (
            DataDependentOutputException,
            DynamicOutputShapeException,
            UnsupportedOperatorException,
        ) as error:
            raise TraceFailed(
                f"the operation {func} in {self.modules[-1] if self.modules else 'the step'} has a "
                f"result that depends on data ({type(error).__name__}), so it cannot be planned; "
                "`lowres run` runs it unplanned"
            ) from error
        if func in CHOOSING:
            size = args[0].shape[dimension(func, args, kwargs)] if args[0].dim() else 1
            return tree_map_only(torch.Tensor, lambda t: round_robin(t, size), out)
        if func._opname[-1:] == "_" and args and not isinstance(args[0], FakeTensor):
            if isinstance(args[0], torch.Tensor):
                return args[0]  # A real tensor that fake values are written into stays what it is.
        return out

    def _note_all(self, func: Any, args: Any, out: Any) -> None:
        if isinstance(out, torch.Tensor):
            self._note(out, func, self._place_by(args, None))
        elif isinstance(out, list | tuple):
            for position, leaf in enumerate(out):
                if isinstance(leaf, torch.Tensor):
                    self._note(leaf, func, self._place_by(args, position))

    def _place_by(self, args: Any, position: int | None) -> int:
        """Outside of modules (optimizer, clipping) work belongs to the block of its input.

        Args:
            position: Of the result in a list of results, which go with a list of inputs.
        """
        if self.place != OUTSIDE or self.stage in ("forward", "backward", "predict"):
            return self.place
        tensors = [a for a in args if isinstance(a, torch.Tensor) or is_list_of_tensors(a)]
        if not tensors:
            return self._latest_place  # Made from nothing, it goes with its neighbour.
        first = tensors[0]
        if isinstance(first, list | tuple):
            first = first[position] if position is not None and position < len(first) else None
        if not isinstance(first, torch.Tensor):
            return OUTSIDE
        number = self.number(first)
        if number is not None:
            self._latest_place = self._serving.get(number, self.trace.births[number].place)
        return self._latest_place

    def _note(
        self, tensor: torch.Tensor, func: Any, place: int, module: str | None = None,
        category: str = "",
    ) -> None:  # fmt: skip
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._numbers:
            return
        size = storage.nbytes()
        if not size:
            return
        width = tensor.shape[-1] if tensor.dim() else 0
        number = self._born(size, place, str(func), width, category, module)
        self.trace.births[number].host = host.kind_of(tensor)
        self._numbers[key] = number

        def gone(_: Any) -> None:
            if self._numbers.pop(key, None) is not None:
                self._watches.pop(key, None)
                self._died(number, size)

        self._watches[key] = weakref.ref(storage, gone)

    def _born(
        self, size: int, place: int, operation: str, width: int, category: str,
        module: str | None = None,
    ) -> int:  # fmt: skip
        trace = self.trace
        number = len(trace.births)
        stage = self.stage
        if module is None:
            module = self.modules[-1] if self.modules else ""
            if module and stage == "backward":
                stage = "recomputation"
        trace.births.append(Birth(size, place, stage, module, operation, width, category))
        trace.tensors.append(number)
        trace.sizes.append(size)
        trace.places.append(place)
        return number

    def _died(self, number: int, size: int) -> None:
        trace = self.trace
        place = self.place
        if place == OUTSIDE:
            place = trace.births[number].place
            trace.loose.append(len(trace.tensors))
        trace.tensors.append(number)
        trace.sizes.append(-size)
        trace.places.append(place)

    def _cost(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        place = self._place_by(args, None)
        cost = cost_of(func, args, kwargs, out, place, self.stage, self._is_fixed)
        if cost is None:
            return
        self.trace.costs += over_bus(cost, func is aten.copy_.default, (args, kwargs))

    def _is_fixed(self, tensor: torch.Tensor) -> bool:
        number = self.number(tensor)
        return number is not None and self.trace.births[number].category != ""

    def _unknown(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """What an operation takes inside is not seen; as much as it handles is assumed."""
        unknown, handled = self.trace.unknown, handled_bytes((args, kwargs, out))
        unknown[str(func)] = max(unknown.get(str(func), 0), handled)
