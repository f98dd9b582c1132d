"""Log-probabilities of tokens in the memory of their logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowres.levers._logprobs import overwriting_logprobs
from lowres.memory.live import LiveBytes

N, D, V = 6, 8, 500


def _made(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a head and words; some logits are far apart."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, D, dtype=dtype, generator=generator) for n in (N, V))
    words = torch.randint(V, (N,), generator=generator)
    return hidden.mul_(20).requires_grad_(), head.requires_grad_(), words


def test_values_and_gradients_are_those_of_cross_entropy() -> None:
    """Reference: torch's, in float64 to its rounding; each token has a gradient of its own."""
    found = []
    weights = torch.linspace(-1, 1, N, dtype=torch.float64)
    for logprobs in (
        overwriting_logprobs,
        lambda logits, words: -F.cross_entropy(logits, words, reduction="none"),
    ):
        hidden, head, words = _made()
        values = logprobs(hidden @ head.T, words)
        (values * weights).sum().backward()
        found.append((values.detach(), hidden.grad, head.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_nothing_of_the_size_of_the_logits_is_made_beside_them() -> None:
    """Closed form: one tensor (N, V) at any time, forward and backward."""
    hidden, head, words = _made(torch.float32)
    head = head.detach()  # else its gradient, of (V, D), is there too
    with LiveBytes("cpu", [hidden, head, words]) as live:
        before = live.now_bytes
        overwriting_logprobs(hidden @ head.T, words).sum().backward()
    size = N * V * 4
    assert size <= live.peak_bytes - before < 1.1 * size


def test_logits_that_are_kept_elsewhere_are_not_overwritten_in_silence() -> None:
    """Behaviour: tanh keeps its outputs for its own backward."""
    hidden, head, words = _made()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        overwriting_logprobs((hidden @ head.T).tanh(), words).sum().backward()
