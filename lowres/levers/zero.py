"""Divide or move optimizer states, gradients and parameters with DeepSpeed's ZeRO.

Paper: ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, Rajbhandari 2019.
https://arxiv.org/abs/1910.02054

Departs from the paper: as DeepSpeed does it; on one device nothing is divided, and what is saved is
what is offloaded (ZeRO-Offload, https://arxiv.org/abs/2101.06840).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lowres.core.errors import InputError
from lowres.core.parts import Circumstance, Lever, NonNegativeInt, PositiveInt, part
from lowres.core.rotation import Rotating
from lowres.levers._weights import Weights

if TYPE_CHECKING:
    import torch

    from lowres.core.engine import Engine
    from lowres.core.learner import Learner
    from lowres.core.recipe import Recipe

Place = Literal["none", "cpu", "nvme"]
_ELEMENTS_TOGETHER = 100_000_000
"""That are updated together where states are on nvme: four buffers of 4 bytes each. DeepSpeed's
are 1e9, which makes 16 GB of buffers."""


@part
class Zero(Lever):
    """Stages: 1 divides optimizer states among processes, 2 gradients too, 3 parameters too.

    States are updated by torch's optimizer where they lie, so no compiler is needed for it. All
    stages are planned, by the fields or by `config`, for one process and for several, but for a
    JSON that asks for what a plan does not know (the run says what).

    What lies on nvme (stage 3) passes through page-locked host memory: four buffers of float32 for
    the sub-group that is updated, at most 100 million elements and the parameter that exceeds them,
    and for parameters buffers of the largest one's size, one more than a block has. Tensors of less
    than 1 MiB, and up to 1e9 elements of trained parameters, stay in host memory.

    Losses are those of the plain run, but for loop.precision bf16: instead of autocast DeepSpeed
    holds, computes with and saves all weights in bfloat16 and updates float32 copies of the trained
    ones. Losses are then those of the plain run to the rounding of bfloat16.

    Args:
        offload_optimizer: Where states and the update live.
        offload_parameters: Where parameters wait until a layer needs them; stage 3.
        nvme_path: Folder on a fast disk, for `nvme`.
        bucket_elements: Gradients that are reduced together, in a bucket on the device; a copy of
            it is made where it holds those of several processes.
        whole_elements: Parameters of at most so many elements stay whole once a layer has needed
            them; stage 3.
        pin_memory: Lock the pages of what is offloaded: faster, and cannot be swapped out.
        config: A DeepSpeed JSON instead of the fields above. Batch sizes, accumulation, clipping,
            fp16 and bf16 are the recipe's: leave them out, or say `auto`. Sections `optimizer` and
            `scheduler` are refused, for the recipe has its own, and so is what DeepSpeed does not
            know.
    """

    brings: ClassVar[frozenset[Circumstance]] = frozenset({"updated_apart"})
    effect: ClassVar[Literal["exact", "lossy"]] = "exact"
    forms: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Models of the table are small: many of their weights would stay whole.
        "zero stage 3": {"stage": 3, "offload_parameters": "cpu", "whole_elements": 0}
    }
    whole_process: ClassVar[bool] = True

    stage: Literal[1, 2, 3] = 2
    offload_optimizer: Place = "cpu"
    offload_parameters: Place = "none"
    nvme_path: str | None = None
    bucket_elements: PositiveInt = 5_000_000
    whole_elements: NonNegativeInt = 100_000  # DeepSpeed's
    pin_memory: bool = False
    config: str | None = None

    def brought(self) -> frozenset[Circumstance]:
        try:
            stage = self._settings()["zero_optimization"]["stage"]
        except InputError:  # `check` tells of it
            stage = self.stage
        return self.brings | ({"divided"} if stage == 3 else set())

    def form(self) -> str:
        return "zero stage 3" if "divided" in self.brought() else self.name

    def check(self, recipe: Recipe) -> Iterator[str]:
        from lowres.bridges import deepspeed, deepspeed_disk, deepspeed_json, deepspeed_known

        missing = deepspeed.problem()
        if missing is not None:
            yield missing
        yield from self._own_fields()
        try:
            settings = self._settings()
        except InputError as error:
            yield from (problem.text for problem in error.problems)
            return
        if self.config is not None:
            wrong = list(deepspeed_known.unknown(settings)) if missing is None else []
            if wrong:
                yield from wrong
                return
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            yield from deepspeed_json.contradictions(settings, recipe, processes)
        zero = settings["zero_optimization"]
        disk = self._on_disk()
        if disk:
            missing = deepspeed_disk.nvme_problem()
            if zero.get("stage") != 3:
                yield (
                    f"stage {zero.get('stage')} keeps what it offloads in host memory, nvme or "
                    "not; use stage 3, or cpu"
                )
            if any(place.get("nvme_path") is None for place in disk):
                yield "nvme wants a folder; set nvme_path"
            elif missing is not None:
                yield f"offloading to nvme: {missing}"
            if recipe.loop.save_every is not None:
                yield (
                    "DeepSpeed's checkpoints of what lies on nvme do not bring the weights back, "
                    "so a run could not be resumed; set loop.save_every to null, or offload to cpu"
                )
        if zero.get("stage") == 3 and any(isinstance(lever, Weights) for lever in recipe.levers):
            yield (
                "stage 3 divides weights of one type that it can read; use stage 2, or drop the "
                "lever that holds them in another form"
            )
        reason = recipe.optimizer.refuses.get("divided")
        if reason is not None:
            yield f"'{recipe.optimizer.name}' {reason}"
        if isinstance(recipe.freezing, Rotating):
            yield (
                f"freezing '{recipe.freezing.name}' changes what is trained, and DeepSpeed divides "
                "it once; use 'optimizer_offload', or freezing 'prefix'"
            )
        if recipe.loop.precision == "fp16":
            yield "under fp16 DeepSpeed scales the loss by its own rules; use loop.precision: bf16"

    def _own_fields(self) -> Iterator[str]:
        usual = type(self)()
        given = [name for name in ("stage", "offload_optimizer", "offload_parameters", "nvme_path",
                                   "bucket_elements", "whole_elements", "pin_memory")
                 if getattr(self, name) != getattr(usual, name)]  # fmt: skip
        if self.config is not None and given:
            yield f"config and {', '.join(given)} say the same twice; give one of the two"
        if self.offload_parameters != "none" and self.stage != 3:
            yield f"stage {self.stage} does not move parameters; use stage 3, or offload_optimizer"
        if self.whole_elements != usual.whole_elements and self.stage != 3:
            yield f"stage {self.stage} divides no parameters; use stage 3, or drop whole_elements"

    def on_accelerator(self, options: dict[str, Any]) -> dict[str, Any]:
        from lowres.bridges import deepspeed, deepspeed_shapes

        if deepspeed_shapes.planned() is not None:
            # DeepSpeed casts the model instead of autocast.
            return options | {"mixed_precision": "no"}
        return options | {"deepspeed_plugin": deepspeed.plugin(self._settings())}

    def uneven(self) -> str | None:
        return "DeepSpeed lays all trained parameters into one tensor"

    def on_learner(self, learner: Learner) -> Learner:
        from lowres.bridges import deepspeed_fitting, deepspeed_shapes

        deepspeed_shapes.cast(learner.base)
        if deepspeed_shapes.planned() is None and self._on_disk():
            deepspeed_fitting.fit(learner.base, choose=self.config is None)
        return learner

    def on_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        import torch

        from lowres.bridges import (
            deepspeed_divided,
            deepspeed_fitting,
            deepspeed_settings,
            deepspeed_shapes,
        )

        wanted = deepspeed_shapes.planned()
        if wanted is None:
            if self._on_disk():
                deepspeed_fitting.fit_groups(optimizer.param_groups)
            return optimizer  # accelerate gives it to DeepSpeed
        settings = deepspeed_settings.planned_settings(self._settings())
        if settings.stage == 3:
            assert wanted.model is not None
            processes, dtype = wanted.processes, wanted.half or torch.float32
            fitted = deepspeed_fitting.fitted(
                self._settings(), wanted.model, processes, dtype, choose=self.config is None
            )
            groups = optimizer.param_groups
            deepspeed_fitting.stop_at_misread(fitted, groups, processes, dtype)
            settings = deepspeed_settings.planned_settings(fitted)
            return deepspeed_divided.Divided(optimizer, wanted, settings, wanted.model)
        return deepspeed_shapes.Partitions(optimizer, wanted, settings.offload, settings.pinned)

    def on_engine(self, engine: Engine) -> Engine:
        from lowres.bridges import (
            deepspeed,
            deepspeed_divided_updates,
            deepspeed_settings,
            deepspeed_shapes,
            deepspeed_updates,
        )

        if deepspeed_shapes.planned() is not None:
            settings = deepspeed_settings.planned_settings(self._settings())
            if settings.stage == 3:
                return deepspeed_divided_updates.DividedUpdates(engine, settings)
            return deepspeed_updates.PlannedUpdates(engine, settings)
        return deepspeed.ZeroUpdates(engine)

    def _on_disk(self) -> list[Mapping[str, Any]]:
        """What DeepSpeed is told of states and parameters that are to lie on nvme."""
        zero = self._settings()["zero_optimization"]
        places = [zero.get(key) or {} for key in ("offload_optimizer", "offload_param")]
        return [place for place in places if place.get("device") == "nvme"]

    def _settings(self) -> Mapping[str, Any]:
        from lowres.bridges import deepspeed_json

        if self.config is not None:
            return deepspeed_json.settings_from(self.config)
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": self.bucket_elements,
            "allgather_bucket_size": self.bucket_elements,
        }
        for key, place in (
            ("offload_optimizer", self.offload_optimizer),
            ("offload_param", self.offload_parameters),
        ):
            if place != "none":
                zero[key] = {"device": place, "pin_memory": self.pin_memory}
                if place == "nvme":
                    zero[key]["nvme_path"] = self.nvme_path
        if self.offload_optimizer == "nvme":
            zero["sub_group_size"] = _ELEMENTS_TOGETHER
        if self.stage == 3:
            zero["stage3_prefetch_bucket_size"] = self.bucket_elements
            zero["stage3_param_persistence_threshold"] = self.whole_elements
        if self.offload_parameters == "nvme":
            # What is fetched ahead or kept for later needs a buffer of the largest's size each.
            zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
        return {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
