"""The task digits: its splits, its images, and how they are drawn."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from lowres.core.errors import InputError
from lowres.tasks.digits import SHADES, SIDE, SPLITS, WHITE, Digits, moved

pytest.importorskip("sklearn")
VERSION_1 = "844d7045e5d9b9d4"


def shades(text: str) -> bytes:
    return bytes(SHADES.index(c) for c in text.replace("\n", ""))


def test_the_splits_have_the_sizes_that_the_docstring_names() -> None:
    """Closed form: all 1,797 images, each in one split, named by its place in the data set."""
    task = Digits()
    assert {s: len(task.examples(s)) for s in task.splits()} == SPLITS
    places = [e.id.rpartition("-")[2] for s in task.splits() for e in task.examples(s)]
    assert sorted(map(int, places)) == list(range(1797))


def test_every_digit_is_about_as_frequent_in_each_split() -> None:
    """Behaviour: a tenth each; the bounds are three standard errors of a draw of 300."""
    for split in SPLITS:
        rows = Digits().examples(split)
        for count in Counter(e.label for e in rows).values():
            assert 0.04 < count / len(rows) < 0.16


def test_the_images_are_those_of_version_1() -> None:
    """Reference: written down once; a change to them asks for a new `version`."""
    assert Digits.version == 1
    lines = [f"{e.id}\t{e.text}\t{e.label}\n" for s in SPLITS for e in Digits().examples(s)]
    assert hashlib.sha256("".join(lines).encode()).hexdigest()[:16] == VERSION_1


@pytest.mark.parametrize("moved", [False, True])
def test_the_image_and_its_drawing_are_the_same(moved: bool) -> None:
    """Closed form: 17 shades, as characters and as bytes from 0 to 255."""
    for example in Digits(moved=moved).examples("in_domain"):
        assert example.image is not None and example.image.shape == (1, SIDE, SIDE)
        there = [round(s * 255 / WHITE) for s in shades(example.text)]
        assert list(example.image.pixels) == there


def test_moving_takes_pixels_along_and_brings_in_black() -> None:
    """Reference: slices of the image's rows and columns; there and back loses one edge alone."""
    image = bytes(range(1, 65))
    rows = [image[i : i + SIDE] for i in range(0, 64, SIDE)]
    assert moved(image, 1, 0) == bytes(SIDE) + b"".join(rows[:-1])
    assert moved(image, 0, -1) == b"".join(row[1:] + b"\0" for row in rows)
    assert moved(moved(image, -1, 0), 1, 0) == bytes(SIDE) + b"".join(rows[1:])


@pytest.mark.parametrize("everywhere", [False, True])
def test_images_are_moved_where_they_should_be_and_as_they_are_elsewhere(everywhere: bool) -> None:
    """Reference: scikit-learn's images and labels; out of domain both tasks have the same."""
    from lowres.bridges.sklearn import digits

    published, task = digits(), Digits(moved=everywhere)
    for split in SPLITS:
        for example in task.examples(split):
            own, label = published[int(example.id.rpartition("-")[2])]
            assert label == example.label
            far = everywhere or split == "out_of_domain"
            ways = [(0, 1), (0, -1), (1, 0), (-1, 0)] if far else [(0, 0)]
            assert shades(example.text) in [moved(own, *way) for way in ways]
    assert task.examples("out_of_domain") == Digits().examples("out_of_domain")


def test_a_split_that_is_not_there_is_refused_by_name() -> None:
    """Behaviour."""
    with pytest.raises(InputError, match="no split is named 'test'; there are train, in_domain"):
        Digits().examples("test")
