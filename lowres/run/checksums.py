"""Sums by which it is seen whether a tensor has changed, without a copy of it."""

from __future__ import annotations

import torch

_SAMPLE = 4096
_CHUNK = 1 << 20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: torch.Tensor) -> int:
    """A sum over all elements' bits, read as integers, modulo 2^64; 8 MiB at most are made."""
    total = 0
    for part in torch.split(_bits(tensor), _CHUNK):
        wide = part.to(torch.int64)
        # Squared, since opposite changes of equal numbers would leave a plain sum as it was.
        total += int(wide.mul_(wide).sum())
    return total % (1 << 64)


def sampled(tensor: torch.Tensor) -> int:
    """The same over some thousand elements."""
    bits = _bits(tensor)
    return checksum(bits[:: max(1, bits.numel() // _SAMPLE)])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as a vector of integers, without a copy where they lie densely."""
    flat = tensor.detach()
    if not flat.is_contiguous():
        order = sorted(range(flat.dim()), key=flat.stride, reverse=True)
        flat = flat.permute(order)
    flat = flat.reshape(-1)
    return flat if flat.dtype == torch.bool else flat.view(_INTEGERS[flat.element_size()])
