"""Tell which digit was written by hand; small images that come with scikit-learn.

Source: Optical Recognition of Handwritten Digits, Alpaydin and Kaynak 1998,
https://doi.org/10.24432/C50P49, its test part of 1,797 images of 8 x 8 pixels in 17 shades, as in
scikit-learn's `load_digits`. A text model sees the picture drawn in characters, one for each shade.

Sizes: `train` 1,197 images; `in_domain` 300; `out_of_domain` 300 more, each moved by one pixel up,
down, left or right, with black where nothing was. They are drawn once and for all, and no image
is in two splits.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

from lowres.core.errors import InputError, Problem
from lowres.core.example import Example
from lowres.core.images import Image
from lowres.core.parts import part
from lowres.tasks._classification import Classification

SPLITS = {"train": 1197, "in_domain": 300, "out_of_domain": 300}
SIDE, WHITE = 8, 16
SHADES = ".123456789abcdefg"


@part
class Digits(Classification):
    """One image; which digit is it?

    Args:
        moved: Whether the images of all splits are moved: a domain to adapt a model to that has
            learned them as they are.
    """

    version = 1
    labels = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    metric = "accuracy"
    pattern = "{text}\nThe digit is"
    label_words = (
        " zero", " one", " two", " three", " four", " five", " six", " seven", " eight", " nine",
    )  # fmt: skip

    moved: bool = False

    def splits(self) -> tuple[str, ...]:
        return tuple(SPLITS)

    def examples(self, split: str) -> Sequence[Example]:
        if split not in SPLITS:
            reason = f"no split is named '{split}'; there are {', '.join(SPLITS)}"
            raise InputError(f"the task '{self.name}'", [Problem("task.evaluate", reason)])
        return _rows(self.moved)[split]


@functools.lru_cache(maxsize=2)
def _rows(all_moved: bool) -> dict[str, tuple[Example, ...]]:
    """The rows of each split; an id names the split and the image's place in the data set."""
    from lowres.bridges.sklearn import digits

    images = digits()
    order = list(range(len(images)))
    random.Random("digits").shuffle(order)
    rows, start = {}, 0
    for split, count in SPLITS.items():
        rng, made = random.Random(f"digits-{split}"), []
        for place in order[start : start + count]:
            shades, label = images[place]
            if all_moved or split == "out_of_domain":
                shades = moved(shades, *rng.choice([(0, 1), (0, -1), (1, 0), (-1, 0)]))
            made.append(_example(f"{split}-{place}", shades, label))
        rows[split] = tuple(made)
        start += count
    return rows


def moved(shades: bytes, down: int, right: int) -> bytes:
    """An image whose pixels went so far; what comes in is black, what goes out is lost."""

    def at(row: int, column: int) -> int:
        inside = 0 <= row < SIDE and 0 <= column < SIDE
        return shades[row * SIDE + column] if inside else 0

    return bytes(at(r - down, c - right) for r in range(SIDE) for c in range(SIDE))


def _example(name: str, shades: bytes, label: int) -> Example:
    lines = [shades[at : at + SIDE] for at in range(0, len(shades), SIDE)]
    return Example(
        id=name,
        text="\n".join("".join(SHADES[shade] for shade in line) for line in lines),
        label=label,
        image=Image(bytes(round(shade * 255 / WHITE) for shade in shades), (1, SIDE, SIDE)),
    )
