"""Tell grammatical sentences from ungrammatical ones; embedded, so it needs no download.

Source: own grammar and lexicon, made for this project; in the manner of BLiMP (Warstadt et al.
2020, https://arxiv.org/abs/1912.00582): minimal pairs of sentences that differ in one point.

Phenomena: gender and number of reflexives, pronoun case, word order, inversion in questions,
negative polarity, comparison, transitivity.
Held out: agreement of subject and verb (simple, across a prepositional phrase, across a relative
clause, after "there") and of determiner and noun; the verb form after an auxiliary, irregular verb
forms, negation and do-support, the passive voice; "much" and "many", gerund or infinitive.

Sizes, half of each grammatical: `train` 6,000 rows; `in_domain` 1,000 rows of the same phenomena
and words in other sentences; `out_of_domain` 1,000 rows with nouns, names, adjectives and verbs
that `train` lacks, half of them of the phenomena of `train` and half of those held out. Both
sentences of a pair are in the same split.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from itertools import cycle, islice
from typing import NamedTuple

from lowres.core.errors import InputError, Problem
from lowres.core.example import Example
from lowres.core.parts import NonNegativeInt, part
from lowres.tasks import _grammar, _lexicon
from lowres.tasks._classification import Classification
from lowres.tasks._phrases import Draw

SPLITS = ("train", "in_domain", "out_of_domain")


class Pair(NamedTuple):
    """A right and a wrong sentence that differ in one point."""

    phenomenon: str
    right: str
    wrong: str


@part
class Grammaticality(Classification):
    """One sentence; is it English?

    Args:
        seed: Seed of the sentences. Results compare only between runs with the same one.
    """

    version = 1
    labels = ("ungrammatical", "grammatical")
    metric = "accuracy"
    # The minimal pattern of Mosbach et al. 2023, https://arxiv.org/abs/2305.16938
    pattern = "{text} ?"
    label_words = (" No", " Yes")

    seed: NonNegativeInt = 0

    def splits(self) -> tuple[str, ...]:
        return SPLITS

    def examples(self, split: str) -> Sequence[Example]:
        if split not in SPLITS:
            known = ", ".join(SPLITS)
            reason = f"no split is named '{split}'; there are {known}"
            raise InputError(f"the task '{self.name}'", [Problem("task.evaluate", reason)])
        return _rows(self.seed)[split]


def pairs(seed: int) -> dict[str, list[Pair]]:
    """The minimal pairs of each split; no sentence occurs twice."""
    rng = random.Random(seed)
    known, held_out = Draw(rng, _lexicon.known()), Draw(rng, _lexicon.held_out())
    seen: set[str] = set()

    def made(count: int, phenomena: _grammar.Phenomena, draw: Draw) -> list[Pair]:
        return [_new(name, phenomena, draw, seen) for name in islice(cycle(phenomena), count)]

    return {
        "train": made(3000, _grammar.KNOWN, known),
        "in_domain": made(500, _grammar.KNOWN, known),
        "out_of_domain": made(250, _grammar.KNOWN, held_out)
        + made(250, _grammar.HELD_OUT, held_out),
    }


def _new(name: str, phenomena: _grammar.Phenomena, draw: Draw, seen: set[str]) -> Pair:
    """A pair of sentences that are both not in `seen`, where they are added."""
    while True:
        right, wrong = phenomena[name](draw)
        if right != wrong and right not in seen and wrong not in seen:
            seen.update((right, wrong))
            return Pair(name, right, wrong)


@functools.lru_cache(maxsize=2)
def _rows(seed: int) -> dict[str, tuple[Example, ...]]:
    """The rows of each split, shuffled; an id names the split, the row and the phenomenon."""
    rng = random.Random(seed)
    rows = {}
    for split, made in pairs(seed).items():
        labelled = [(p.phenomenon, p.right, 1) for p in made]
        labelled += [(p.phenomenon, p.wrong, 0) for p in made]
        rng.shuffle(labelled)
        rows[split] = tuple(
            Example(id=f"{split}-{i}-{phenomenon}", text=text, label=label)
            for i, (phenomenon, text, label) in enumerate(labelled)
        )
    return rows
