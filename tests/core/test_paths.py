"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from lowres.core.paths import write_whole


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    """Behaviour."""
    for text in ("first", "è second"):
        write_whole(tmp_path / "a.json", text)
        assert (tmp_path / "a.json").read_bytes() == text.encode()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_disk_that_fills_up_costs_nothing_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: half of the text is written when the disk is full."""
    write_whole(tmp_path / "a.json", "first")
    plain = Path.write_text

    def full(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
        plain(self, text[: len(text) // 2], *args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a.json", "the second one")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "first")]
