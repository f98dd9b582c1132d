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


def fingerprint(tensor: torch.Tensor) -> tuple[int, int]:
    """A sum over all bytes, eight read as one integer, and `checksum` of some thousand elements.

    The first sees any one change for one reading of the tensor, without a copy; the second sees
    some of those that the first adds up to nothing, such as two elements exchanged.
    """
    bits = _bits(tensor)
    sample = checksum(bits[:: max(1, bits.numel() // _SAMPLE)])
    if bits.dtype == torch.bool:
        bits = bits.view(torch.uint8)
    each = 8 // bits.element_size()
    whole = bits[: bits.numel() // each * each]
    # A part of a larger buffer may begin where no integer of 8 bytes can be read.
    aligned = whole.storage_offset() % each == 0
    parts = [whole] if aligned else (part.clone() for part in torch.split(whole, _CHUNK))
    total = sum(int(part.view(torch.int64).sum()) for part in parts)
    total += int(bits[whole.numel() :].sum(dtype=torch.int64))
    return total % (1 << 64), sample


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as a vector of integers, without a copy where they lie densely."""
    flat = tensor.detach()
    if not flat.is_contiguous():
        order = sorted(range(flat.dim()), key=flat.stride, reverse=True)
        flat = flat.permute(order)
    flat = flat.reshape(-1)
    return flat if flat.dtype == torch.bool else flat.view(_INTEGERS[flat.element_size()])
