"""The only door to PEFT: adapters put into a model, and lowres's own tuners made known to PEFT."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowres.bridges import quiet, sites
from lowres.core.errors import InputError, LowresError, Problem

if TYPE_CHECKING:
    from torch import nn

    from lowres.core.blocks import Blocks

ALL_LINEAR = "all-linear"
PAPER_DEFAULT = "paper"


def preload() -> None:
    """Import what any method may need, without bitsandbytes's remark about an optional package."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import lowres.bridges.peft_tuner  # noqa: F401
    finally:
        logger.setLevel(level)


def inject(model: nn.Module, config: Any, blocks: Blocks) -> nn.Module:
    """Put an adapter into the model; what was made anew (a classification head) trains beside it.

    Args:
        config: A PEFT config whose `target_modules` are set.
        blocks: Its `head` becomes PEFT's `modules_to_save`.
    """
    import peft

    from lowres.bridges import lora

    config.modules_to_save = list(blocks.head) or None
    # Losses are computed outside the model, so the plain wrapper serves every head; the saved file
    # names the type, so that PEFT's and transformers' Auto classes can load it.
    config.task_type = None
    with lora.making(), quiet.peft():
        adapted = peft.get_peft_model(model, config)
    adapted.peft_config["default"].task_type = task_type(model)
    lora.settle(adapted)
    return adapted


def task_type(model: nn.Module) -> str | None:
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    if getattr(model.config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def lora_config(**fields: Any) -> Any:
    import peft

    return peft.LoraConfig(**fields)


def linear_targets(model: nn.Module, blocks: Blocks, wanted: str) -> list[str]:
    """Module paths of the linear layers to adapt.

    Args:
        wanted: `all-linear` (every linear layer inside the blocks), `paper` (queries and values, by
            PEFT's table of architectures, or else where `sites` finds them), or layer names joined
            by `+`.

    Raises:
        InputError: When nothing in the trained blocks has such a name, listing what is there.
    """
    read = sites.read_by_kernels(model)
    linear = [n for n in _linears(model) if _inside(n, blocks.names) and n not in read]
    last = {name: name.rpartition(".")[2] for name in linear}
    if wanted == ALL_LINEAR:
        _stop_at_experts(model, blocks, sorted(set(last.values())))
        chosen = linear
    else:
        names = _paper_targets(model, blocks) if wanted == PAPER_DEFAULT else wanted.split("+")
        meant = lambda n: n in names or any(n.endswith("." + w) for w in names)
        chosen = [n for n in linear if meant(n)]
        for name in names:
            if not any(n == name or n.endswith("." + name) for n in linear):
                there = ", ".join(sorted(set(last.values())))
                why = f"no linear layer is named '{name}'; there are {there}"
                if any(n == name or n.endswith("." + name) for n in read):
                    why = (
                        f"the weight of '{name}' is read by a kernel, and what stands beside the "
                        f"layer would have no effect; there are {there}"
                    )
                raise InputError("the recipe", [Problem("method.targets", why)])
    chosen = [n for n in chosen if _inside(n, blocks.trained)]
    if not chosen:
        raise InputError(
            "the recipe",
            [
                Problem(
                    "method.targets",
                    "none of them lies in a block that the freezing leaves trained",
                )
            ],
        )
    if not blocks.frozen:
        # Short names read better in adapter_config.json, and say the same when every block trains.
        short = sorted({last[n] for n in chosen})
        everywhere = {n for n in _linears(model) if n.rpartition(".")[2] in short}
        if everywhere == set(chosen):
            return short
    return chosen


def linear_paths(model: nn.Module, blocks: Blocks, wanted: str) -> list[str]:
    """As `linear_targets`, always whole paths, in the order of the model."""
    found = linear_targets(model, blocks, wanted)
    return [n for n in _linears(model) if any(n == f or n.endswith("." + f) for f in found)]


def _stop_at_experts(model: nn.Module, blocks: Blocks, there: list[str]) -> None:
    """Raise InputError where a block's experts are one tensor of all, and no linear layers."""
    for path, parameter in model.named_parameters():
        if parameter.ndim > 2 and "expert" in path and _inside(path, blocks.trained):
            text = (
                f"all-linear does not reach the experts ('{path}' is no linear layer); name the "
                f"layers that are to be adapted: {'+'.join(there)}"
            )
            raise InputError("the recipe", [Problem("method.targets", text)])


def _paper_targets(model: nn.Module, blocks: Blocks) -> Sequence[str]:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TABLE

    model_type = getattr(model.config, "model_type", "")
    if model_type not in TABLE:
        try:
            found = sites.attentions(model, blocks, trained_only=False)
        except InputError as error:
            text = (
                f"which layers are queries and values of a '{model_type}' is not known; "
                "name them, or use all-linear"
            )
            raise InputError("the recipe", [Problem("method.targets", text)]) from error
        return sorted({path for a in found for path in (a.query, a.value)})
    known = TABLE[model_type]
    if not isinstance(known, str):
        return list(known)
    return [n for n in _linears(model) if re.fullmatch(known, n)]


def _linears(model: nn.Module) -> list[str]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]


def _inside(name: str, modules: Any) -> bool:
    return any(name.startswith(m + ".") for m in modules)


def load_adapter(model: nn.Module, folder: Path) -> Any:
    """The model with a saved adapter beside its weights, frozen; lowres's own kinds are known.

    Raises:
        InputError: When a tensor of the adapter is missing in the folder, one too many, or of
            another size, or when a file is missing or damaged.
    """
    import peft

    from lowres.bridges import adapter_files, lora, prompts
    from lowres.bridges.peft_configs import keep_types

    preload()
    with adapter_files.all_found(folder):
        prompted = prompts.load(model, folder)
        if prompted is not None:
            return prompted
        with quiet.peft():
            adapted = peft.PeftModel.from_pretrained(model, str(folder))
    keep_types(adapted)
    lora.settle(adapted)
    return adapted


def disabled(model: Any) -> contextlib.AbstractContextManager[Any]:
    """While it lasts, the model answers as without its adapter."""
    return model.disable_adapter()


def merge(model: Any) -> nn.Module:
    """Fold the adapter into the weights; the plain model comes back.

    Raises:
        LowresError: Over quantised weights, which would be rounded anew.
    """
    from lowres.bridges.bitsandbytes import quantisation_states

    if any(quantisation_states(model)):
        raise LowresError(
            "an adapter is not merged into quantised weights: packing them again would round away "
            "what was learned; `lowres export` takes the base in 16 bits or more instead"
        )
    from lowres.bridges.peft_tuner import DeltaTuner

    if not isinstance(model.base_model, DeltaTuner):  # which does so after its checks
        unwrap_heads(model)
    merged: nn.Module = model.merge_and_unload()
    return merged


def unwrap_heads(model: nn.Module, trained: bool = True) -> None:
    """Put what was trained beside an adapter, or what was there before, in the wrapper's place.

    PEFT 0.21 leaves the wrapper (norms) or fails at one around several modules (RoBERTa's head).
    """
    from peft.utils import ModulesToSaveWrapper

    for path, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            kept: Any = module.original_module
            if trained:
                kept = module.modules_to_save[module.active_adapters[0]]
            model.set_submodule(path, kept)


def bare(module: Any) -> Any:
    """A module without the adapter around it."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def unwrap_adapted(model: Any) -> nn.Module:
    """The transformers model inside, adapters in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
