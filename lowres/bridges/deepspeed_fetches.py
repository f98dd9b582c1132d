"""When DeepSpeed's ZeRO stage 3 puts parameters together and lets them go, for a plan.

The first forward and backward pass is recorded; from then on parameters are fetched ahead of their
use, and kept where they are used again soon.

Source: deepspeed 0.19, runtime/zero/partitioned_param_coordinator.py
(`PartitionedParameterCoordinator`).
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

import torch

from lowres.bridges.deepspeed_files import Buffers
from lowres.bridges.deepspeed_parts import Gathering, Part
from lowres.bridges.deepspeed_settings import Settings


class Fetches:
    """Follows the modules of a model at work.

    Args:
        parts: By their parameter's id.
    """

    def __init__(
        self, model: torch.nn.Module, parts: dict[int, Part], settings: Settings, processes: int
    ) -> None:
        self._parts, self._processes = parts, processes
        self._buffers = next(iter(parts.values())).buffers
        self._ahead = settings.prefetch_elements(model)
        self._most = int(settings.divided["stage3_max_live_parameters"])
        self._reuse = int(settings.divided["stage3_max_reuse_distance"])
        self._read: dict[int, list[Part]] = {}
        self._coming: dict[Part, Gathering] = {}
        self._mode = "none"
        self._modules: list[torch.nn.Module] = []
        self._order: list[tuple[Part, int]] = []
        self._waiting: collections.deque[tuple[Part, int]] = collections.deque()
        self._fetched_for: dict[Part, int] = collections.defaultdict(lambda: -1)
        self._released: dict[tuple[int, int], frozenset[Part]] = {}
        self._step = self._whole_elements = 0
        self._backward: dict[int, torch.nn.Module] = {}
        self._recomputed: dict[int, set[Part]] = collections.defaultdict(set)

    def of(self, module: torch.nn.Module) -> list[Part]:
        """What a module reads: its own parameters, and others that it was seen to read."""
        if id(module) not in self._read:
            own = [self._parts[id(p)] for p in module.parameters(recurse=False)]
            self._read[id(module)] = own
        return self._read[id(module)]

    def read_by(self, module: torch.nn.Module, part: Part) -> None:
        """A module reads a parameter of another one."""
        if part not in self.of(module):
            self.of(module).append(part)

    def begin(self) -> None:
        """A forward pass of the whole model begins."""
        self._drop_coming()
        if self._mode == "recording":
            self._order = [
                (part, step)
                for step, module in enumerate(self._modules)
                for part in sorted(self.of(module), key=lambda p: p.number)
            ]
            self._mode = "recorded"
        elif self._mode == "none":
            self._mode = "recording"
        self._waiting = collections.deque(self._order)
        self._fetched_for.clear()
        self._step = self._whole_elements = 0

    def fetch(self, module: torch.nn.Module, forward: bool) -> None:
        """A module is about to work, forward or backward."""
        self._follow(module)
        if not forward:
            self._backward[id(module)] = module
        wanted = self.of(module)
        self._gather(wanted)
        recomputing = forward and torch._C._current_graph_task_id() != -1
        for part in wanted:
            part.users.add(id(module))
            if recomputing and self._backward and not part.parameter.requires_grad:
                last = next(reversed(self._backward))
                self._recomputed[last].add(part)
                part.users.add(last)
            if part in self._coming:
                self._coming.pop(part).wait()
        if self._mode == "recorded":
            self._fetch_ahead(wanted)
        self._step += 1

    def release(self, module: torch.nn.Module, forward: bool) -> None:
        """A module has worked."""
        own = self.of(module)
        released = set(self._not_used_soon(module) if self._mode == "recorded" else own)
        if not forward:
            again = self._recomputed.pop(id(module), set())
            released |= {part for part in again if not part.stays}
            own = list(dict.fromkeys([*own, *again]))
            self._backward.pop(id(module), None)
        for part in own:
            part.users.discard(id(module))
            if part in released:
                self._let_go(part)

    def release_all(self) -> None:
        """An update begins: of every parameter the part alone is left."""
        for part in self._parts.values():
            if part in self._coming:
                self._coming.pop(part).wait()
            part.users.clear()
            self._let_go(part)

    def end_backward(self) -> None:
        """Modules whose inputs need no gradient are not told that their backward pass is over."""
        while self._backward:
            key, module = self._backward.popitem()
            for part in [*self.of(module), *self._recomputed.pop(key, set())]:
                part.users.discard(key)
                if not part.stays:
                    self._let_go(part)

    def _follow(self, module: torch.nn.Module) -> None:
        if self._mode == "recorded":
            known = self._step < len(self._modules) and self._modules[self._step] is module
            if not known:  # Another pass than the recorded one: record anew.
                self._mode, self._modules, self._order = "none", [], []
                self._waiting.clear()
                self._fetched_for.clear()
                self._released.clear()
                self._drop_coming()
        elif self._mode == "recording":
            self._modules.append(module)

    def _drop_coming(self) -> None:
        for part, gathering in self._coming.items():
            gathering.wait()
            self._let_go(part)
        self._coming.clear()

    def _gather(self, parts: Iterable[Part]) -> None:
        apart = [part for part in parts if part.state == "apart"]
        if apart:
            self._whole_elements += sum(part.elements for part in apart)
            gathering = Gathering(apart, self._processes)
            self._coming.update(dict.fromkeys(apart, gathering))

    def _let_go(self, part: Part) -> None:
        if part.let_go():
            self._whole_elements -= part.elements

    def _fetch_ahead(self, wanted: list[Part]) -> None:
        new = {part for part in wanted if self._fetched_for[part] < self._step}
        seen: set[Part] = set()
        while self._waiting and len(seen) < len(new):
            part, step = self._waiting.popleft()
            self._fetched_for[part] = step
            seen.add(part)
        if not self._ahead:
            return
        most = min(self._most - self._whole_elements, self._ahead)
        chosen: dict[Part, None] = {}
        elements = 0
        while self._waiting and elements < most:
            part, step = self._waiting.popleft()
            if part.on_disk and not part.read:
                self._waiting.appendleft((part, step))
                break
            self._fetched_for[part] = max(self._fetched_for[part], step)
            if part.state == "apart" and part not in chosen:
                chosen[part] = None
                elements += part.elements
        self._gather(chosen)
        if self._buffers is not None:
            self._read_ahead(self._buffers)

    def _read_ahead(self, buffers: Buffers) -> None:
        """What comes after that is read from the disk, as far as there are buffers."""
        most = 2 * sum(part.elements for part in self._coming)
        considered = 0
        chosen: list[Part] = []
        for part, _ in self._waiting:
            if considered > most or len(chosen) >= buffers.free:
                break
            if part.on_disk and not part.read:
                chosen.append(part)
            considered += part.elements
        buffers.read(chosen)

    def _not_used_soon(self, module: torch.nn.Module) -> frozenset[Part]:
        # As DeepSpeed, once for each place in the pass: what was fetched ahead then decides.
        key = (id(module), self._step)
        if key not in self._released:
            found = {p for p in self.of(module) if not p.stays}
            found -= {p for p in self.of(module) if self._fetched_for[p] > self._step}
            passed = 0
            for later in self._modules[self._step :]:
                if passed >= self._reuse:
                    break
                for part in self.of(later):
                    found.discard(part)
                    passed += part.elements
            self._released[key] = frozenset(found)
        return self._released[key]


class ReadParameters(dict[str, Any]):
    """A module's own parameters: one that another module reads while it is apart is fetched.

    Source: runtime/zero/parameter_offload.py (`ZeROOrderedDict`).
    """

    def __init__(self, parameters: dict[str, Any], hooks: Any) -> None:
        super().__init__(parameters)
        self._hooks = hooks

    def __getitem__(self, key: str) -> Any:
        parameter = super().__getitem__(key)
        if parameter is not None:
            self._hooks.read(parameter)
        return parameter
