"""What the libraries say that is no news to a user: it stands in lowres's own output, or is theirs
to mend."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def transformers() -> Iterator[None]:
    """No load report or bars: what matters of them is told by lowres."""
    from transformers.utils import logging as reports

    level = reports.get_verbosity()
    bars = reports.is_progress_bar_enabled()
    reports.set_verbosity_error()
    reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(level)
        if bars:
            reports.enable_progress_bar()


@contextlib.contextmanager
def peft() -> Iterator[None]:
    """PEFT 0.21 reads a name that transformers 5.23 deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield


@contextlib.contextmanager
def deepspeed() -> Iterator[None]:
    """No remarks while the block runs: accelerate imports it as a model is saved."""
    logger = logging.getLogger("DeepSpeed")
    before = list(logger.filters)
    keep_deepspeed_quiet()
    try:
        yield
    finally:
        logger.filters[:] = before


def keep_deepspeed_quiet() -> None:
    """From here on: it tells of each of its steps at the level of warnings, on standard output."""
    # A filter stays when the package, imported later, sets the level.
    logging.getLogger("DeepSpeed").addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
