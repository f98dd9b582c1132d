"""What several processes can share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lowres.core.errors import InputError
from lowres.run import processes

PACKED = {
    "objective": "next_token",
    "task": {"name": "text", "files": [__file__], "valid_files": [__file__]},
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"freezing": {"name": "lisa", "at_once": 1}}, "agree once"),
        ({"levers": ["optimizer_offload"]}, "`levers`: .*no longer be exchanged"),
        ({"levers": ["frozen_offload"], "method": "lora"}, "one kind of device"),
        ({"levers": [{"name": "sequence_packing", "max_tokens": 64}], **PACKED}, "max_tokens to"),
        ({"loop": {"global_batch_size": 12, "micro_batch_size": 4}}, "no multiple"),
    ],
)
def test_what_one_process_alone_can_do_is_refused_to_two(
    changes: dict[str, Any], words: str, recipe: Callable[..., Any]
) -> None:
    """Behaviour: one process does it; two get one error that says what to do."""
    one = recipe("decoder", **changes)
    processes.check(one, 1)
    with pytest.raises(InputError, match=words):
        processes.check(one, 2)
