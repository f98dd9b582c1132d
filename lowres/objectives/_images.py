"""Rows of examples that are images."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from lowres.core.errors import InputError, Problem
from lowres.core.example import Example, Row

if TYPE_CHECKING:
    from lowres.core.images import ImageReader
    from lowres.core.learner import Encoder


def image_row(example: Example, encoder: Encoder) -> Row:
    """The row of a labelled image.

    Raises:
        InputError: When the example has no image, or not one that the model reads.
    """
    reader = cast("ImageReader", encoder.tokenizer)
    image = example.image
    if image is None:
        raise _refused("task", "its rows are text, and the model reads images; choose a task with "
                               "images (digits), or a text model")  # fmt: skip
    if image.shape != reader.shape:
        given, wanted = (" x ".join(map(str, shape)) for shape in (image.shape, reader.shape))
        raise _refused("task", f"its images have {given} values (channels, height, width), the "
                               f"model reads {wanted}; choose a model of their size")  # fmt: skip
    if reader.tokens > encoder.max_length:
        raise _refused("loop.max_length", f"{encoder.max_length} is less than the {reader.tokens} "
                                          "tokens of an image, which is not cut; raise it"
                       )  # fmt: skip
    assert example.label is not None
    # Every patch is a real token: the mask says how many there are.
    return Row(example.id, {"attention_mask": [1] * reader.tokens}, [example.label], image=image)


def _refused(where: str, why: str) -> InputError:
    return InputError("the recipe", [Problem(where, why)])
