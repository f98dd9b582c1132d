"""Whether a model fits through DeepSpeed's buffers between a disk and memory, and which fit it.

Source: deepspeed 0.19, runtime/swap_tensor/partitioned_param_swapper.py (`get_buffer`, `swap_in`),
runtime/zero/partitioned_param_coordinator.py (`__all_gather_params_`);
csrc/aio/common/deepspeed_aio_common.cpp (`_do_io_complete`: what a read returns is not looked at).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowres.bridges import adapter_files
from lowres.bridges.deepspeed_buffers import SECTOR_BYTES, STATE_BUFFERS, disk_of, refusal
from lowres.bridges.deepspeed_settings import SUB_GROUP_ELEMENTS, staying_elements

if TYPE_CHECKING:
    import torch
    from torch import nn


def fit(model: nn.Module, choose: bool) -> None:
    """Hold a run's settings against its model, before DeepSpeed takes it over; see `fitted`."""
    settings, processes, dtype = _of_the_run()
    if disk_of(settings).weights and dtype.itemsize == 4:
        from deepspeed.accelerator import get_accelerator

        if not get_accelerator().is_fp16_supported():
            raise refusal(
                "on a device without float16, such as this one, DeepSpeed rounds what it writes to "
                "nvme to bfloat16; set loop.precision: bf16, or offload_parameters: cpu"
            )
    settings.update(fitted(settings, model, processes, dtype, choose))


def fit_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Hold a run's settings against an optimizer's groups; see `stop_at_misread`."""
    settings, processes, dtype = _of_the_run()
    stop_at_misread(settings, groups, processes, dtype)


def _of_the_run() -> tuple[dict[str, Any], int, torch.dtype]:
    """DeepSpeed's settings, processes, and what the model is cast to."""
    import torch
    from accelerate.state import AcceleratorState

    state = AcceleratorState()
    dtype = torch.bfloat16 if state.mixed_precision == "bf16" else torch.float32
    return state.deepspeed_plugin.deepspeed_config, state.num_processes, dtype


def fitted(
    settings: Mapping[str, Any],
    model: nn.Module,
    processes: int,
    dtype: torch.dtype,
    choose: bool,
) -> dict[str, Any]:
    """Settings with which a model fits.

    Args:
        dtype: That DeepSpeed casts the model to.
        choose: Buffers are to be chosen here, not the user's: for the largest parameter, and as
            many as a block has parameters and one more, for those of a block that is recomputed
            are in use together.

    Raises:
        InputError: Where DeepSpeed would stop, or compute with wrong weights.
    """
    settings, disk = dict(settings), disk_of(settings)
    if disk.states and disk.state_buffers < STATE_BUFFERS:
        raise refusal(
            f"offload_optimizer.buffer_count is {disk.state_buffers}, and an update reads "
            f"{STATE_BUFFERS} tensors together; say {STATE_BUFFERS}"
        )
    if disk.weights:
        sizes = {name: -(-p.numel() // processes) for name, p in model.named_parameters()}
        large = {name: size for name, size in sizes.items() if disk.takes(size, dtype)}
        if choose:
            zero = settings["zero_optimization"]
            place = {"buffer_size": max(large.values(), default=1), "buffer_count": 1}
            place["buffer_count"] += max(len(large.keys() & some) for some in _together(model))
            settings["zero_optimization"] = zero | {"offload_param": zero["offload_param"] | place}
        _stop_at_weights(settings, model, sizes, large)
    return settings


def _together(model: nn.Module) -> Iterator[set[str]]:
    """Names of the parameters of each block, and of each module by itself."""
    from torch import nn

    blocks = [path for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    for path, module in model.named_modules():
        inside = path.rpartition(".")[0] in blocks
        yield {name for name, _ in module.named_parameters(path, recurse=inside)}


def _stop_at_weights(
    settings: Mapping[str, Any], model: nn.Module, sizes: dict[str, int], large: dict[str, int]
) -> None:
    """Raise InputError for parameters on a disk.

    Args:
        sizes: Elements of the parts of parameters, by name.
        large: Those that are large enough to be on the disk.
    """
    disk = disk_of(settings)
    largest = max(large, key=lambda name: large[name], default="")
    if large and large[largest] > disk.weight_elements:
        raise refusal(
            f"offload_param.buffer_size is {disk.weight_elements}, and '{largest}' has "
            f"{large[largest]} elements in each process; say {large[largest]} at least"
        )
    named = dict(model.named_parameters())
    trained = sum(size for name, size in sizes.items() if named[name].requires_grad)
    in_memory = trained <= disk.in_memory_elements
    away = [name for name in large if not (in_memory and named[name].requires_grad)]
    staying = staying_elements(settings["zero_optimization"], model)
    for name in away:
        if named[name].numel() <= staying:
            raise refusal(
                f"parameters of at most {staying} elements stay whole, such as '{name}' with "
                f"{named[name].numel()}, and DeepSpeed gives away the buffer of one that was read "
                f"from nvme; say fewer than {named[name].numel()} (whole_elements, or "
                "stage3_param_persistence_threshold)"
            )
    saved = set(map(id, saved_together(model)))
    together = sum(id(named[name]) in saved for name in away)
    if together > disk.weight_buffers:
        raise refusal(
            f"what is saved is put together at once, {together} of its parameters lie on nvme, and "
            f"offload_param.buffer_count is {disk.weight_buffers}; use offload_parameters: cpu, or "
            "a method that saves an adapter"
        )


def stop_at_misread(
    settings: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    processes: int,
    dtype: torch.dtype,
) -> None:
    """Raise InputError where DeepSpeed would read into the middle of a sector: such reads fail, it
    does not look, and trains with what was there before.

    Args:
        groups: An optimizer's.
        dtype: That DeepSpeed casts the model to.
    """
    import torch

    disk = disk_of(settings)
    most = int(settings["zero_optimization"].get("sub_group_size", SUB_GROUP_ELEMENTS))
    for group in groups:
        in_group = in_sub_group = 0
        for parameter in group["params"]:
            size = -(-parameter.numel() // processes)
            gradient = disk.states and disk.takes(size, torch.float32) and in_sub_group * 4
            whole = disk.takes(size, dtype) and size == disk.aligned(size, dtype)
            weight = disk.weights and whole and in_group * dtype.itemsize
            if gradient % SECTOR_BYTES or weight % SECTOR_BYTES:
                raise refusal(
                    f"trained parameters of {tuple(parameter.shape)} do not begin at a multiple of "
                    f"{SECTOR_BYTES} bytes among those of their group, and DeepSpeed misreads them "
                    "from nvme; use cpu instead of nvme"
                )
            in_group, in_sub_group = in_group + size, in_sub_group + size
            if in_sub_group >= most:
                in_sub_group = 0


def saved_together(model: nn.Module) -> list[nn.Parameter]:
    """What must be whole while a model is saved: of an adapted one what is trained or written."""
    every = list(model.parameters())
    if not hasattr(model, "peft_config"):
        return every
    written = set(map(id, adapter_files.parameters_of(model)))
    return [p for p in every if p.requires_grad or id(p) in written]
