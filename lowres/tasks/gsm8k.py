"""Grade-school arithmetic in words: write the steps, then the number.

Paper: Training Verifiers to Solve Math Word Problems, Cobbe et al. 2021.
https://arxiv.org/abs/2110.14168

The answer follows `####`; calculator marks `<<...>>` of the source are taken out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from lowres.core import metrics
from lowres.core.errors import InputError
from lowres.core.example import Asks, Example, Prediction
from lowres.core.metrics import Metric
from lowres.core.parts import Task, part
from lowres.tasks import _files

_STEMS = {"train": "train", "in_domain": "test"}
_HUB = "openai/gsm8k"
_CALCULATOR = re.compile(r"<<[^>]*>>")
_FINAL = re.compile(r"####\s*(-?[\d,]*\.?\d+)")


@part
class Gsm8k(Task):
    """Metric: exact match of the number after `####`.

    Args:
        folder: Local folder; None takes `gsm8k` under the data folder, else the hub.
    """

    version: ClassVar[int] = 1
    asks: ClassVar[Asks] = "answer"
    metric: ClassVar[str] = "exact_match"

    folder: str | None = None

    def splits(self) -> tuple[str, ...]:
        return tuple(_STEMS)

    def examples(self, split: str) -> Sequence[Example]:
        out, broken = [], []
        for i, row in enumerate(self._rows(split)):
            answer = _CALCULATOR.sub("", row["answer"])
            if final_number(answer) is None:
                broken.append(f"row {i + 1}: its answer has no number after ####")
                continue
            out.append(
                Example(
                    id=f"{split}-{i}",
                    text=f"Question: {row['question']}\nAnswer:",
                    answer=" " + answer,
                )
            )
        home = _files.folder_of("gsm8k", self.folder) or Path(_HUB)
        _files.stop_if_broken(home / _STEMS[split], broken)
        if not out:
            raise InputError(f"gsm8k, split '{split}'", ["it has no rows"])
        return out

    def _rows(self, split: str) -> Iterable[Mapping[str, str]]:
        folder = _files.folder_of("gsm8k", self.folder)
        if folder is not None:
            return _files.table(folder, _STEMS[split], ("question", "answer"))
        from lowres.bridges import datasets

        return datasets.hub_rows(_HUB, "main", _STEMS[split])

    def score(
        self, examples: Sequence[Example], predictions: Sequence[Prediction]
    ) -> Mapping[str, Metric]:
        gold = [final_number(e.answer or "") for e in examples]
        # An answer without a number equals no gold number.
        said = [final_number(str(p.value)) for p in predictions]
        return {"exact_match": metrics.accuracy(gold, said)}

    def baseline(self, train: Sequence[Example], examples: Sequence[Example]) -> Prediction:
        common = Counter(final_number(e.answer or "") for e in train).most_common(1)[0][0]
        return Prediction(f"#### {common}")


def final_number(text: str) -> float | None:
    """The first number after `####`, commas taken out; None where there is none."""
    found = _FINAL.search(text)
    return float(found.group(1).replace(",", "")) if found else None
