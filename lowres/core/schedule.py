"""Learning rate over a run, as a pure function of the update, so that resuming needs no state.

`linear`, `cosine` and `constant` agree with transformers' schedules of the same names;
`warmup_stable_decay` holds the rate and lets it fall linearly to zero over the last fifth
(MiniCPM, Hu et al. 2024, https://arxiv.org/abs/2404.06395).
"""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant", "warmup_stable_decay"]

DECAY_SHARE = 0.2


def factor(schedule: Schedule, step: int, steps: int, warmup_steps: int) -> float:
    """What the base learning rate is multiplied by at update `step` (from 0) of `steps`."""
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    past = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "linear":
        return max(0.0, 1.0 - past)
    if schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * past)))
    if schedule == "warmup_stable_decay":
        left = (steps - step) / max(1, round(DECAY_SHARE * steps))
        return max(0.0, min(1.0, left))
    return 1.0
