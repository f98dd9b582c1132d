"""The only door to accelerate: device, precision, processes, checkpoints, trackers."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowres.core.errors import InputError, Problem
from lowres.core.parts import fold

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import nn

    from lowres.core.method import Method
    from lowres.core.recipe import Recipe

TRAINED = "trained.safetensors"
METHOD = "method.safetensors"
_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
_LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def make(recipe: Recipe) -> Any:
    """The Accelerator of a run: the environment (`accelerate launch`) decides device and processes.

    Levers change its options (`on_accelerator`).

    Raises:
        InputError: When the device cannot do the precision asked for, or the launcher wants an
            engine that the recipe does not name.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from lowres.bridges import deepspeed

    loop = recipe.loop
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        # accelerate keeps the first Accelerator's precision for the whole Python process; a second
        # run in it may want another.
        AcceleratorState._reset_state(reset_partial_state=True)
    options = fold({"mixed_precision": loop.precision}, recipe.levers, "on_accelerator")
    divides = options.get("deepspeed_plugin") is not None
    _stop_at_other_engines(divides)
    try:
        made = Accelerator(**options)
        if divides:
            deepspeed.complete(
                made.deepspeed_plugin, loop.micro_batch_size, made.num_processes, loop.max_grad_norm
            )
        if options["mixed_precision"] == "fp16" and made.device.type == "cpu":
            # accelerate says nothing and computes in float32.
            raise ValueError("there is no float16 on a CPU; set loop.precision to bf16 or no")
        return made
    except (ValueError, RuntimeError) as error:
        if divides:
            text = f"'zero': DeepSpeed does not start with these settings: {error}"
            raise InputError("the recipe", [Problem("levers", text)]) from error
        if loop.precision == "no":
            raise
        raise InputError(
            "the recipe",
            [
                Problem(
                    "loop.precision", f"'{loop.precision}' does not work on this device: {error}"
                )
            ],
        ) from error


def _stop_at_other_engines(divides: bool) -> None:
    """A launcher's own settings of an engine would change what the recipe says, or break it."""
    on = [name for key, name in _ENGINES.items() if os.environ.get(key, "").lower() == "true"]
    # accelerate keeps DeepSpeed's switch for the process; the launcher alone sets this beside it.
    if divides or "ACCELERATE_CONFIG_DS_FIELDS" not in os.environ:
        on = [name for name in on if name != "DeepSpeed"]
    if on:
        text = (
            f"it was launched with settings of {on[0]}, and the recipe has no lever for that; add "
            "the lever 'zero', which divides with DeepSpeed, or launch without those settings"
        )
        raise InputError("the recipe", [Problem("levers", text)])


def loss_scale(accelerator: Any) -> float | None:
    """What the loss is multiplied with for float16's sake; None in other precisions."""
    scaler = getattr(accelerator, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())


def is_main() -> bool:
    """Whether this is the process that speaks, before or after a run."""
    return int(os.environ.get("RANK", "0")) == 0


def start_trackers(accelerator: Any, output: Path, recipe: Recipe) -> None:
    """Begin logging to the trackers of the recipe, under the output folder."""
    if not recipe.loop.trackers:
        return
    from accelerate.tracking import filter_trackers

    # The folder is chosen after the Accelerator exists, which the processes need to agree on it.
    accelerator.project_configuration.set_directories(str(output))
    accelerator.log_with = filter_trackers(list(recipe.loop.trackers), str(output))
    accelerator.init_trackers("tensorboard", config={"digest": recipe.digest})


def end_trackers(accelerator: Any, *, together: bool) -> None:
    """Flush and close them.

    Args:
        together: Every process comes here. One that failed alone would wait for ever for the others
            to leave their group with it, before its error is told.
    """
    if together or accelerator.num_processes == 1:
        accelerator.end_training()
        return
    for tracker in accelerator.trackers:
        tracker.finish()


def from_main_process(accelerator: Any, items: list[Any]) -> list[Any]:
    """The main process's list, on every process."""
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(items, from_process=0)
    return items


def agreed(items: list[Any]) -> list[Any]:
    """The main process's list, on every process, wherever no Accelerator is at hand."""
    from accelerate.state import PartialState, is_initialized

    return from_main_process(PartialState(), items) if is_initialized() else items


def sum_over_processes(accelerator: Any, values: Sequence[float]) -> list[float]:
    """Add up float64 numbers over all processes; every process gets the sums."""
    if accelerator.num_processes == 1:
        return list(values)
    import torch

    tensor = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    return [float(v) for v in accelerator.reduce(tensor, reduction="sum").tolist()]


def gather(accelerator: Any, items: list[Any]) -> list[Any]:
    """Lists of all processes, joined in process order."""
    if accelerator.num_processes == 1:
        return items
    from accelerate.utils import gather_object

    joined: list[Any] = gather_object(items)
    return joined


def checkpoint_trained_only(accelerator: Any, model: nn.Module, method: Method) -> None:
    """Make `save_state` write the trained parameters and the method's state, as safetensors.

    The frozen ones are in the checkpoint that the recipe names; writing them again would make each
    checkpoint of an 8B model 16 GB, and quantised ones cannot be written at all.
    """
    from safetensors.torch import load_file, save_file

    # Now, and not when it is written: later some of it may rest for a while.
    ever = [name for name, p in model.named_parameters() if p.requires_grad]

    def trained() -> dict[str, torch.Tensor]:
        there = dict(model.named_parameters())
        # Which entries an adapter changes, and other choices that it made by data.
        chosen = {n: b for n, b in model.named_buffers() if "lowres_delta_parts" in n}
        return {name: there[name].detach() for name in ever} | chosen

    def save(_models: list[nn.Module], weights: list[Any], folder: str) -> None:
        weights.clear()
        if uses_deepspeed(accelerator):
            return  # Its own checkpoint holds them, each process its part.
        if accelerator.is_main_process:
            save_file({n: p.contiguous() for n, p in trained().items()}, Path(folder) / TRAINED)
            state = {n: t.contiguous() for n, t in method.state(model).items()}
            if state:
                save_file(state, Path(folder) / METHOD)

    def load(models: list[nn.Module], folder: str) -> None:
        models.clear()
        if uses_deepspeed(accelerator):
            return
        there = load_file(Path(folder) / TRAINED)
        own = trained()
        if there.keys() != own.keys():
            odd = sorted(there.keys() ^ own.keys())
            raise InputError(
                f"'{folder}'", [f"it holds other parameters than the recipe trains: {odd[:5]}"]
            )
        for name, parameter in own.items():
            parameter.copy_(there[name].to(parameter.device))
        if (Path(folder) / METHOD).exists():
            method.restore(model, load_file(Path(folder) / METHOD))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def uses_deepspeed(accelerator: Any) -> bool:
    """Whether updates and checkpoints are DeepSpeed's."""
    return getattr(accelerator.state, "deepspeed_plugin", None) is not None


def save_state(accelerator: Any, folder: Path) -> None:
    """Write what a resumed run reads; frozen parameters are left out."""
    frozen = {"exclude_frozen_parameters": True} if uses_deepspeed(accelerator) else {}
    accelerator.save_state(str(folder), safe_serialization=True, **frozen)


def load_state(accelerator: Any, folder: Path) -> None:
    """Read it back."""
    from lowres.bridges import deepspeed_disk

    if uses_deepspeed(accelerator):
        deepspeed_disk.stop_at_disk(accelerator.state.deepspeed_plugin, folder)
    frozen = {"load_module_strict": False} if uses_deepspeed(accelerator) else {}
    accelerator.load_state(str(folder), **frozen)


@contextlib.contextmanager
def alone_on_cpu(recipe: Recipe) -> Iterator[Any]:
    """An Accelerator of one process on the CPU, whatever this process was launched as.

    accelerate keeps the state of all its objects in class attributes; they are exchanged while the
    block runs. float16 is stood in for by bfloat16: it has the same bytes, and the CPU has no
    loss scaling.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    classes = (PartialState, AcceleratorState, GradientState)
    before = [cls._shared_state for cls in classes]
    environment = {
        k: v for k, v in os.environ.items() if k in _LAUNCHED or k.startswith("ACCELERATE_")
    }
    for name in environment:
        del os.environ[name]
    for cls in classes:
        cls._shared_state = {}
    precision = "bf16" if recipe.loop.precision == "fp16" else recipe.loop.precision
    options = fold({"mixed_precision": precision}, recipe.levers, "on_accelerator")
    try:
        yield Accelerator(cpu=True, **options)
    finally:
        for cls, state in zip(classes, before, strict=True):
            cls._shared_state = state
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
        os.environ.update(environment)
