"""Log-probabilities of tokens, in the memory of the logits that they are taken from.

`torch.nn.functional.cross_entropy` holds three tensors of the logits' size in backward: their
log-softmax, and the gradients of both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def overwriting_logprobs(logits_NV: torch.Tensor, words_N: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (N,) of the words; the logits are overwritten.

    torch raises in backward where an operation before this one has kept the logits for its own.
    """
    made: torch.Tensor = _Logprobs.apply(logits_NV, words_N)  # type: ignore[no-untyped-call]
    return made


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, words_N: torch.Tensor) -> torch.Tensor:
        words_N1 = words_N[:, None]
        scores_NV = logits_NV.detach()
        most_N1 = scores_NV.amax(-1, keepdim=True)
        own_N1 = scores_NV.gather(-1, words_N1) - most_N1
        total_N1 = scores_NV.sub_(most_N1).exp_().sum(-1, keepdim=True)
        ctx.save_for_backward(scores_NV, total_N1, words_N1)
        return (own_N1 - total_N1.log())[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: torch.Tensor) -> tuple[torch.Tensor, None]:
        scores_NV, total_N1, words_N1 = ctx.saved_tensors
        gradient_N1 = gradient_N[:, None]
        scores_NV.mul_(-gradient_N1 / total_N1).scatter_add_(-1, words_N1, gradient_N1)
        return scores_NV, None
