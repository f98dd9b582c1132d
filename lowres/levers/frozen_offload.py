"""Hold the frozen weights of the blocks off the device; each block's come while it is at work.

Paper: ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning, Rajbhandari et
al. 2021 (section 5.1). https://arxiv.org/abs/2104.07857

Departs from the paper: one device, frozen weights alone; 4-bit weights travel packed; files are
read through the system's cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from lowres.core.errors import InputError, Problem
from lowres.core.parts import Lever, part
from lowres.core.rotation import Rotating

if TYPE_CHECKING:
    from lowres.core.example import Row
    from lowres.core.learner import Learner, LoadRequest
    from lowres.core.recipe import Recipe


@part
class FrozenOffload(Lever):
    """What is trained, embeddings, norms outside of blocks and heads stay on the device.

    On CUDA host memory is pinned, which takes it from all other processes and comes in powers of
    two, and the next block is copied on a stream of its own while one computes. Every block is
    copied twice an update's micro-batch, three times when blocks are recomputed: large
    micro-batches hide that, small ones wait for it. On a CPU the same copies are made within one
    memory.

    With `disk` the weights wait in files, one a block, which are mapped: the host holds what its
    system caches, and on CUDA one block in pinned memory. The files have no names, so they are gone
    when the run ends, however it does; a resumed run writes them again. While a model is loaded the
    host holds all of it nevertheless.

    With `loop.precision` bf16 or fp16 and `model.dtype` float32, autocast's narrow copies of the
    weights stay until backward as they do without; hold the weights in 16 bits.

    Args:
        resident: Blocks on the device at once: one at work, the others on their way.
        place: Where the others wait.
        folder: Of the files, on a fast disk; None for one under `LOWRES_CACHE` (else in the user's
            cache folder).
    """

    effect: ClassVar[Literal["exact", "lossy"]] = "exact"
    searched: ClassVar[int | None] = 3

    resident: Annotated[int, Field(ge=2, le=3)] = 2
    place: Literal["host", "disk"] = "host"
    folder: str | None = None

    def check(self, recipe: Recipe) -> Iterator[str]:
        if self.folder is not None and self.place != "disk":
            yield f"folder '{self.folder}' is for files; set place: disk, or drop it"
        if recipe.method.trains_weights and recipe.freezing.name == "none":
            yield (
                f"method '{recipe.method.name}' without freezing leaves no frozen weights; use a "
                "method that adds parameters (lora), or freezing 'prefix'"
            )
        if recipe.method.trains_weights and isinstance(recipe.freezing, Rotating):
            yield (
                f"freezing '{recipe.freezing.name}' trains every block sooner or later, so none "
                "can wait on the host; use 'optimizer_offload', or freezing 'prefix'"
            )
        for lever in recipe.levers:
            if "int8" in lever.brought():
                yield (
                    f"layers of '{lever.name}' hold their weights a second time, which would stay "
                    "on the device; use 'nf4_weights'"
                )

    def alone(self) -> str:
        return "moves weights that several processes would want on one kind of device; drop it"

    def on_load(self, request: LoadRequest) -> LoadRequest:
        self._try_folder()
        # Weights in few bits would else be made on the device, all of them.
        return dataclasses.replace(request, options=request.options | {"device_map": {"": "cpu"}})

    def on_learner(self, learner: Learner) -> Learner:
        from lowres.bridges import peft, streaming

        model = peft.unwrap_adapted(learner.base)
        if not streaming.stream(model, learner.blocks.names, self.resident).blocks:
            self._refuse(
                "no weight of a block is frozen; use a method that adds parameters (lora), or "
                "freezing 'prefix'"
            )
        return learner

    def on_rows(self, recipe: Recipe, learner: Learner, rows: Sequence[Row]) -> None:
        from lowres.bridges import streaming
        from lowres.core import host
        from lowres.core.units import format_bytes, gib_to_bytes

        if self.place == "host":
            return
        streamed, limit = streaming.streamed_of(learner.base), recipe.budget.disk_gib
        assert streamed is not None
        size = format_bytes(streamed.size_bytes)
        if limit is not None and streamed.size_bytes > gib_to_bytes(limit):
            text = (
                f"{limit} is less than the {size} of frozen weights that 'frozen_offload' would "
                "put on disk; raise it, or set the lever's place: host"
            )
            raise InputError("the recipe", [Problem("budget.disk_gib", text)])
        streamed.to_disk(None if host.planned() else self._folder())
        if not host.planned():
            text = f"{size} of frozen weights wait in {len(streamed.blocks)} files without a name"
            learner.remarks.append(f"'frozen_offload': {text} in {self._folder()}")

    def _folder(self) -> Path:
        from lowres.core.paths import cache_folder

        if self.folder is not None:
            return Path(self.folder).expanduser()
        return cache_folder() / "frozen_offload"

    def _try_folder(self) -> None:
        """Refuse a folder that cannot be written before anything is loaded."""
        from lowres.core import disk, host

        if self.place == "host" or host.planned():
            return
        try:
            disk.try_folder(self._folder())
        except OSError as error:
            self._refuse(
                f"no file can be made in {self._folder()}: {error.strerror}; name another folder, "
                "or set place: host"
            )

    def _refuse(self, why: str) -> None:
        raise InputError("the recipe", [Problem("levers", f"'frozen_offload': {why}")])
