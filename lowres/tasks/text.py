"""Language modelling over files of plain text.

Paper: none; perplexity as in A Neural Probabilistic Language Model, Bengio et al. 2003.

Files may be gzip or xz; three line ends in a row part two documents.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from lowres.core.errors import InputError
from lowres.core.example import Asks, Example, Prediction
from lowres.core.metrics import Metric
from lowres.core.parts import Task, part
from lowres.tasks import _files

_BETWEEN_DOCUMENTS = "\n\n\n"
_LARGEST = math.log(sys.float_info.max)


@part
class Text(Task):
    """Metric: perplexity per token; bits per character compares models of different tokenizers.

    Args:
        files: Training text, as paths or names under the data folder.
        valid_files: Text to be scored.
    """

    version: ClassVar[int] = 2
    asks: ClassVar[Asks] = "likelihood"
    metric: ClassVar[str] = "perplexity"
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"perplexity", "bits_per_character"})
    sample_fields: ClassVar[Mapping[str, Any]] = {
        "files": ("pretrain/books_valid.txt.xz",),
        "valid_files": ("pretrain/tinyshakespeare.txt.gz",),
    }

    files: tuple[str, ...]
    valid_files: tuple[str, ...] = ()

    def splits(self) -> tuple[str, ...]:
        return ("train", "in_domain") if self.valid_files else ("train",)

    def examples(self, split: str) -> Sequence[Example]:
        out = [
            Example(id=f"{split}-{name}-{i}", text=document)
            for name in (self.files if split == "train" else self.valid_files)
            for i, document in enumerate(_files.text(name).split(_BETWEEN_DOCUMENTS))
            if document.strip()
        ]
        if not out:
            raise InputError("the task", [f"the files of the split '{split}' hold no text"])
        return out

    def score(
        self, examples: Sequence[Example], predictions: Sequence[Prediction]
    ) -> Mapping[str, Metric]:
        """Each prediction is a window's (negative log-likelihood, targets, tokens)."""
        windows = [cast("tuple[float, int, int]", p.value) for p in predictions]
        nll = sum(n for n, _, _ in windows)
        targets = sum(t for _, t, _ in windows)
        characters = sum(len(e.text) for e in examples)
        mean = nll / targets
        # Ratio estimate over windows: residuals of each window against the common mean.
        spread = sum((n - mean * t) ** 2 for n, t, _ in windows)
        stderr = math.sqrt(spread * len(windows) / max(1, len(windows) - 1)) / targets
        # Tokens that are read alone, an encoder's or the first of a window, stand for characters
        # too: what is scored is taken for as many characters a token as all of them.
        tokens = sum(count for _, _, count in windows)
        per_character = tokens / characters / math.log(2)
        perplexity = math.exp(mean) if mean < _LARGEST else math.inf
        return {
            "perplexity": Metric(perplexity, perplexity * stderr),
            "bits_per_character": Metric(mean * per_character, stderr * per_character),
        }
