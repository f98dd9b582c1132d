"""bitsandbytes on a CPU: 4-bit weights whose rows are no multiple of a block.

A scale is that of a block of the flat matrix. The kernel of bitsandbytes 0.50 for CPUs with AVX-512
begins a block with each row instead: of a matrix with 16 input features most weights come out
wrong, silently, by half of their size.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch

_NAME = "dequantize_4bit"


@functools.cache
def mend() -> torch.library.Library:
    """Have the kernel see such a matrix as one long row, for all who call it in this process."""
    plain = torch.library.get_kernel(f"bitsandbytes::{_NAME}", "CPU")

    def unpack(
        keys: Any, packed: Any, scales: Any, block: int, kind: str, shape: Any, dtype: Any
    ) -> Any:
        # Only there, since the kernel divides rows, and not a row, among threads.
        seen = [math.prod(shape)] if shape[-1] % block else shape
        return plain.call_boxed(keys, packed, scales, block, kind, seen, dtype).view(shape)

    ours = torch.library.Library("bitsandbytes", "IMPL")  # holds as long as it is held
    with warnings.catch_warnings(action="ignore"):  # that a kernel is replaced
        ours.impl(_NAME, unpack, "CPU", with_keyset=True, allow_override=True)
    return ours
