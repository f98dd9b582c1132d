"""The only door to DeepSpeed: its settings, its processes on machines without a GPU, its updates.

Source: ZeRO: Memory Optimizations Toward Training Trillion Parameter Models,
https://arxiv.org/abs/1910.02054; ZeRO-Offload, https://arxiv.org/abs/2101.06840.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import socket
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from lowres.bridges import left_locks, quiet
from lowres.bridges.deepspeed_fitting import saved_together
from lowres.core.errors import Diverged, InputError, OutOfMemory, Problem

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.engine import Engine
    from lowres.core.learner import Learner

_STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
_IN_BFLOAT16 = (
    "zero: under loop.precision bf16 DeepSpeed holds, computes with and saves all weights in "
    "bfloat16, without autocast; float32 copies of the trained ones are updated"
)


def problem() -> str | None:
    """Why DeepSpeed cannot be used here, with what would mend it; None when it can."""
    if importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed; DS_BUILD_OPS=0 pip install deepspeed"
    return None


def plugin(settings: Mapping[str, Any]) -> Any:
    """accelerate's plugin for these settings; starts a group of one process where none was
    launched, and answers accelerate's device checks where there is no GPU.

    Raises:
        LowresError: Where it would wait for a build that died.
    """
    left_locks.stop_at_left_locks()
    _take_over(settings)
    _become_a_process()
    _allow_cpu()
    quiet.keep_deepspeed_quiet()
    from accelerate import DeepSpeedPlugin

    return DeepSpeedPlugin(hf_ds_config=dict(settings), zero3_init_flag=False)


def complete(
    plugin_: Any, micro_batch_size: int, processes: int, max_grad_norm: float | None
) -> None:
    """Tell DeepSpeed what it wants to know of the loop; that a JSON says the same was checked.

    lowres counts micro-batches itself, so that DeepSpeed sees updates of one.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # transformers would divide weights while it loads them, before methods and freezing have seen
    # them; DeepSpeed divides them when it takes the model over.
    unset_hf_deepspeed_config()
    if plugin_ is None:
        raise ValueError(
            "it was launched without DeepSpeed; launch with --config_file "
            "recipes/accelerate/zero2-cpu-offload.yaml, or without a launcher"
        )
    settings = plugin_.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = micro_batch_size
    settings["gradient_accumulation_steps"] = 1
    settings["train_batch_size"] = micro_batch_size * processes
    settings["gradient_clipping"] = max_grad_norm or 0.0
    settings["zero_allow_untested_optimizer"] = True
    settings["zero_force_ds_cpu_optimizer"] = False


def partitions_weights(model: nn.Module) -> bool:
    """Whether a model's parameters are divided among the processes (stage 3)."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Put divided parameters together that are trained or written, while the block runs; every
    process must enter. What a forward pass within it uses is divided again by that."""
    if not partitions_weights(model):
        yield
        return
    chosen = saved_together(model)
    import deepspeed

    with deepspeed.zero.GatheredParameters(chosen, modifier_rank=None):
        yield


def is_divided(optimizer: Any) -> bool:
    """Whether an optimizer is DeepSpeed's, which holds parts of parameters."""
    return type(getattr(optimizer, "optimizer", optimizer)).__module__.startswith("deepspeed.")


def elements(parameter: Any) -> int:
    """Of the whole parameter, also where a part alone is at hand."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@contextlib.contextmanager
def whole(parameter: nn.Parameter) -> Iterator[None]:
    """Put one divided parameter together while the block runs; every process must enter."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
        yield


class ZeroUpdates:
    """An engine whose gradients, states and updates are DeepSpeed's."""

    keeps_gradients = True

    def __init__(self, inner: Engine) -> None:
        self.accelerator = inner.accelerator
        self.learner: Learner = inner.learner
        self.optimizer = inner.optimizer
        self.engine = cast(Any, inner.learner.module)
        self._base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self._processes = int(self.engine.dp_world_size)
        self._clipping = float(self.engine.gradient_clipping())
        if self.engine.bfloat16_enabled():
            self.learner.remarks.append(_IN_BFLOAT16)

    def begin(self, lr: float) -> None:
        for group, base in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = base * lr

    def passes(self) -> Iterator[contextlib.AbstractContextManager[Any]]:
        yield contextlib.nullcontext()

    def accumulate(self, loss_sum: torch.Tensor, share: float, last: bool) -> None:
        # DeepSpeed averages over processes; the sum is wanted.
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss_sum * (share * self._processes))

    def update(self, lr: float, max_grad_norm: float | None) -> float | None:
        if (max_grad_norm or 0.0) != self._clipping:
            raise ValueError(f"DeepSpeed was told to clip to {self._clipping}, not {max_grad_norm}")
        self.begin(lr)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        norm = None if norm is None else float(norm)
        if norm is not None and not math.isfinite(norm):
            raise Diverged(
                f"the gradient norm is {norm}; lower optimizer.lr, or compute in a wider type "
                "(loop.precision, model.dtype)"
            )
        return norm if max_grad_norm is not None else None

    def discard(self) -> None:
        raise OutOfMemory(
            "out of memory under DeepSpeed, which has divided the gradients already; lower "
            "loop.micro_batch_size and --resume"
        )


def own_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """What DeepSpeed's optimizer holds beside the model and the states: partitions, buckets."""
    if not is_divided(optimizer):
        return
    inner = getattr(optimizer, "optimizer", optimizer)
    waiting: list[Any] = [vars(inner)]
    if hasattr(inner, "parameter_offload"):  # stage 3: each parameter knows its part
        waiting += [p.ds_tensor for p in inner.module.parameters()]
        waiting += _between_disk_and_memory(inner)
    while waiting:
        found = waiting.pop()
        if hasattr(found, "untyped_storage"):
            yield found
            if found.is_leaf and found.grad is not None:
                yield found.grad
        elif isinstance(found, dict):
            waiting += found.values()
        elif isinstance(found, list | tuple):
            waiting += found
        elif dataclasses.is_dataclass(found):
            waiting += vars(found).values()


def _between_disk_and_memory(optimizer: Any) -> Iterator[Any]:
    """Page-locked buffers of DeepSpeed's swappers, and gradients too small for a file."""
    swapper = next(optimizer.module.parameters()).nvme_swapper
    if swapper is not None:
        yield swapper.buffers
        yield swapper.partitioned_swap_buffer
    if optimizer.optimizer_swapper is not None:
        yield optimizer.optimizer_swapper.swap_buffer_manager.all_buffers
        for info in optimizer.optimizer_swapper.swap_params_info.values():
            yield info.unswapped_gradients


def _take_over(settings: Mapping[str, Any]) -> None:
    """The recipe says what is divided and moved; accelerate refuses to be told twice.

    Raises:
        InputError: Where the launcher's configuration wants another stage.
    """
    asked, stage = os.environ.get(_STAGE), settings["zero_optimization"].get("stage")
    if asked is not None and asked != str(stage):
        text = (
            f"the launcher's configuration says stage {asked}, the recipe stage {stage}; give "
            "both the same"
        )
        raise InputError("the recipe", [Problem("levers", f"'zero': {text}")])
    for name in list(os.environ):
        if name.startswith("ACCELERATE_DEEPSPEED_") or name == "ACCELERATE_CONFIG_DS_FIELDS":
            del os.environ[name]


def _become_a_process() -> None:
    """The environment of a launcher, for one process that was started without."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def _allow_cpu() -> None:
    """Without a GPU accelerate names no backend for DeepSpeed's processes: gloo serves them."""
    import torch

    if torch.cuda.is_available():
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    usual = PartialState._prepare_backend
    if getattr(usual, "answers_for_cpu", False):
        return

    def answered(self: Any, cpu: bool = False, *arguments: Any, **named: Any) -> Any:
        if not cpu and int(os.environ.get("LOCAL_RANK", -1)) != -1:
            return "gloo", DistributedType.MULTI_CPU
        return usual(self, cpu, *arguments, **named)

    answered.answers_for_cpu = True  # type: ignore[attr-defined]
    PartialState._prepare_backend = answered
