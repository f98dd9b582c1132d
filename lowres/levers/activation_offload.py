"""Keep what the backward pass will need of a model in host memory until then.

Paper: ZeRO-Infinity: Breaking the GPU Memory Wall, Rajbhandari et al. 2021 (section 5.1).
https://arxiv.org/abs/2104.07857

Departs from the paper: every large saved tensor moves, not the inputs of checkpointed blocks alone;
with `gradient_checkpointing` beside it these are what is saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lowres.core.errors import InputError
from lowres.core.parts import Lever, PositiveInt, part

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowres.core.learner import Learner


@part
class ActivationOffload(Lever):
    """Costs a copy over the bus in each direction; on CUDA both run beside the computation.

    The model's forward is covered up to its output head: logits never move, nor do parameters,
    buffers and views of them. On a CPU both places are one memory; live bytes count them apart all
    the same. On CUDA memory is given back when its copy is done, so a peak may be above the planned
    one where copying cannot keep up.

    Args:
        smallest_kib: Saved tensors below this size stay on the device; in KiB.
    """

    effect: ClassVar[Literal["exact", "lossy"]] = "exact"
    searched: ClassVar[int | None] = 2

    # `min_offload_size` of TRL's OffloadActivations.
    smallest_kib: PositiveInt = 1

    def on_learner(self, learner: Learner) -> Learner:
        from lowres.bridges import heads, peft

        model = peft.unwrap_adapted(learner.base)
        covered = _Covered(model, learner.base, self.smallest_kib << 10)
        model.register_forward_pre_hook(covered.begin)
        model.register_forward_hook(covered.end, always_call=True)
        try:
            parent, name = heads.head_of(model)
        except InputError:
            return learner
        # Whatever the head saves, and what the model does with the logits, is wanted at once.
        parent.get_submodule(name).register_forward_pre_hook(covered.end)
        return learner


class _Covered:
    """Saved tensors of a model's forward are kept on the host, from `begin` to `end`."""

    def __init__(self, model: nn.Module, base: nn.Module, smallest_bytes: int) -> None:
        self._model, self._base, self._smallest_bytes = model, base, smallest_bytes
        self._hooks: Any = None
        self._stream: torch.cuda.Stream | None = None

    def begin(self, *_: Any) -> None:
        import torch

        from lowres.bridges.bitsandbytes import quantisation_states
        from lowres.levers._saved import Saved

        if not torch.is_grad_enabled():
            return
        device = next(self._model.parameters()).device
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        fixed = [*self._model.parameters(), *self._model.buffers()]
        fixed += [tensor for _, tensor in quantisation_states(self._base)]
        saved = Saved(fixed, device, self._smallest_bytes, self._stream)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack)
        self._hooks.__enter__()

    def end(self, *_: Any) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.__exit__()
