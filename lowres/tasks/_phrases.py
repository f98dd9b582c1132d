"""Random phrases and minimal pairs of sentences, the tools of `_grammar`.

A sentence is a row of slots. A slot that is a pair of texts is where the two sentences of a minimal
pair differ: (right, wrong).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from lowres.tasks._lexicon import Lexicon, Noun, Verb

T = TypeVar("T")

SINGULAR = ("the", "the", "the", "a", "my", "our", "your", "this", "that")
PLURAL = ("the", "the", "the", "two", "my", "our", "your", "these", "those", "several", "three")
HABITS = ("every morning", "every evening", "every day", "every summer", "very often")
MODALS = ("will", "must", "can", "should", "could", "would", "may")

Slot = str | tuple[str, str]


def contrast(*slots: Slot, end: str = ".") -> tuple[str, str]:
    """The right and the wrong sentence of a row of slots; an empty slot says nothing."""

    def side(index: int) -> str:
        words = " ".join(s if isinstance(s, str) else s[index] for s in slots if s)
        return words[0].upper() + words[1:] + end

    return side(0), side(1)


@dataclass(frozen=True, slots=True)
class Draw:
    """Random phrases from a lexicon. Only `random()` and `choice` are used of the generator."""

    rng: random.Random
    words: Lexicon

    def one(self, options: Sequence[T]) -> T:
        return self.rng.choice(options)

    def coin(self) -> bool:
        return self.rng.random() < 0.5

    def swap(self, first: str, second: str, swapped: bool) -> tuple[str, str]:
        return (second, first) if swapped else (first, second)

    def person(self) -> Noun:
        return self.one(self.words.men + self.words.women + self.words.people)

    def couple(self) -> tuple[Noun, Noun]:
        """Two different persons."""
        first, second = self.person(), self.person()
        while first == second:
            second = self.person()
        return first, second

    def quality(self) -> str:
        return self.one(self.one((tuple(a for a, _ in self.words.short), self.words.long)))

    def deed(self) -> Verb:
        return self.one(self.words.strict + self.words.transitive)

    def name(self) -> str:
        return self.one(self.words.male_names + self.words.female_names)

    def phrase(self, noun: Noun, plural: bool, adjectives: Sequence[str] = ()) -> str:
        """Determiner, noun, and now and then one of the adjectives."""
        said = noun.form(plural)
        if adjectives and self.rng.random() < 0.3:
            said = f"{self.one(adjectives)} {said}"
        determiner = self.one(PLURAL if plural else SINGULAR)
        article = "an" if determiner == "a" and said[0] in "aeiou" else determiner
        return f"{article} {said}"

    def someone(self, plural: bool | None = None) -> str:
        plural = self.coin() if plural is None else plural
        return self.phrase(self.person(), plural, (self.quality(),))

    def something(self, plural: bool | None = None) -> str:
        plural = self.coin() if plural is None else plural
        return self.phrase(self.one(self.words.things), plural, self.words.of_things)

    def subject(self, plural: bool = False) -> str:
        """A person, in the singular now and then by name."""
        named = not plural and self.rng.random() < 0.3
        return self.name() if named else self.someone(plural)

    def place(self) -> str:
        noun = self.one(self.words.places)
        return f"{noun.preposition} the {noun.singular}"

    def agreeing(self, plural: bool) -> tuple[tuple[str, str], str]:
        """A predicate for a person: the agreeing word with its wrong form, and what follows."""
        kind = self.rng.randrange(4)
        if kind == 0:
            verb = self.one(self.words.intransitive + self.words.activities)
            rest = self.one((self.place(), f"{self.place()} {self.one(HABITS)}"))
            return self.swap(verb.third, verb.base, plural), rest
        if kind == 1:
            verb = self.deed()
            rest = self.one((self.something(), f"{self.something()} {self.one(HABITS)}"))
            return self.swap(verb.third, verb.base, plural), rest
        if kind == 2:
            forms = self.one((("is", "are"), ("was", "were")))
            return self.swap(*forms, plural), self.one((f"very {self.quality()}", self.place()))
        return self.swap("has", "have", plural), f"{self.deed().participle} {self.something()}"

    def auxiliary(self, form: str, plural: bool = False) -> str:
        """One that asks for this form of the verb: `base`, `participle` or `gerund`."""
        options = {
            "base": MODALS,
            "participle": ("have" if plural else "has",),
            "gerund": ("are", "were") if plural else ("is", "was"),
        }
        return self.one(options[form])
