"""The only door to scikit-learn: a data set of images that comes with the package."""

from __future__ import annotations

from lowres.core.errors import InputError


def digits() -> list[tuple[bytes, int]]:
    """The handwritten digits: 64 grey values from 0 to 16, row by row, and the digit of each.

    Raises:
        InputError: When scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        text = "its images come with scikit-learn; pip install scikit-learn"
        raise InputError("the task 'digits'", [text]) from error
    found = load_digits()
    return [
        (bytes(int(v) for v in values), int(digit))
        for values, digit in zip(found.data.tolist(), found.target.tolist(), strict=True)
    ]
