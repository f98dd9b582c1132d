"""Train vectors that stand before the embeddings of every row.

Paper: The Power of Scale for Parameter-Efficient Prompt Tuning, Lester et al. 2021.
https://arxiv.org/abs/2104.08691

Departs from the paper: vectors start at the embeddings of tokens drawn from the whole vocabulary
(the paper: the 5000 most common) or random normal with deviation 1 (the paper: uniform within 0.5);
they are not started at the words of the labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from lowres.core.method import Taxonomy
from lowres.core.parts import part
from lowres.methods._prompted import Prompted


@part
class PromptTuning(Prompted):
    """`[P; E(x)]`, P (length, D) alone is trained; an encoder-decoder has it before its encoder.

    Every block keeps its activations, and `length` columns more of them.

    Args:
        length: P, how many; they take positions of the model and room in every attention.
        init: Where they start: at the embeddings of tokens drawn from the vocabulary, or `random`.
    """

    taxonomy: ClassVar[Taxonomy] = "additive: soft prompts"
    # The paper takes 0.3 with Adafactor.
    learning_rate_hint: ClassVar[tuple[float, float]] = (1e-2, 3e-1)
    config: ClassVar[str] = "PromptTuningConfig"

    init: Literal["vocabulary", "random"] = "vocabulary"

    def settings(self) -> Mapping[str, Any]:
        names = {"vocabulary": "SAMPLE_VOCAB", "random": "RANDOM"}
        return {"prompt_tuning_init": names[self.init]}
