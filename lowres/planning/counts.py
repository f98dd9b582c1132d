"""How many parameters a method trains on a model, from its configuration alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from lowres.bridges import kinds, rehearsal
from lowres.bridges.bitsandbytes import element_count
from lowres.bridges.blocks import map_blocks
from lowres.core.blocks import Blocks
from lowres.core.choosing import Choosing
from lowres.core.learner import Head, Kind, Learner, LoadRequest
from lowres.core.method import Method
from lowres.core.parts import Freezing
from lowres.core.sample import Sample
from lowres.core.scored import Scored
from lowres.memory.tracer import Tracer

HEADS: dict[Kind, Head] = {
    "decoder": "causal", "encoder": "masked", "encoder_decoder": "seq2seq",
}  # fmt: skip
"""A head that every checkpoint of the kind has: nothing made anew is counted with the method."""


@dataclass(frozen=True)
class Counts:
    """Parameters; tied ones count once.

    Args:
        trainable: Those that get a gradient before the first update.
        model: Those of the model without what the method adds.
    """

    trainable: int
    model: int

    @property
    def share(self) -> float:
        return self.trainable / self.model


def counts(method: Method, config: Any, freezing: Freezing | None = None) -> Counts:
    """Apply a method to a model without weights.

    Args:
        config: Of transformers; it is not changed.
        freezing: Where training is allowed; everywhere when None. Of one that chooses by data, the
            choice that takes most memory.

    Raises:
        InputError: When the method finds no place in the model.
    """
    kind = kinds.kind_of(config)
    head = HEADS.get(kind, "classification")
    request = LoadRequest(
        checkpoint="", revision=None, head=head, labels=0, dtype="float32",
        attention="sdpa" if rehearsal.has_fused_attention(config, head) else "eager",
        init="random", trust_remote_code=False,
    )  # fmt: skip
    tracer = Tracer()
    with rehearsal.rehearsing(), tracer, tracer.paused():
        model, _ = rehearsal.load_shapes(request, copy.deepcopy(config), 0, 0)
        held = sum(element_count(p) for p in model.parameters())
        learner = Learner(model, model, None, kind, head, map_blocks(model))
        blocks = _chosen(freezing, learner)
        if isinstance(method, Choosing):
            adapted = method.put(model, blocks, method.expected(model, blocks))
        else:
            adapted = method.apply(model, blocks)
        trained = sum(element_count(p) for p in adapted.parameters() if p.requires_grad)
    return Counts(trained, held)


def _chosen(freezing: Freezing | None, learner: Learner) -> Blocks:
    if freezing is None:
        return learner.blocks
    if isinstance(freezing, Scored):
        return Scored.keep(learner.blocks, freezing.costliest(learner.blocks.names))
    nothing: Any = None  # Without data no other freezing asks for an objective.
    return freezing.blocks(learner, Sample((), nothing, nothing, 1))
