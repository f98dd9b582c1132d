"""What users' own files are like."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from lowres.core.errors import InputError
from lowres.tasks import _files

ROW = {"sentence": "fine", "label": "1"}


def test_a_mark_before_the_first_letter_is_no_letter(tmp_path: Path) -> None:
    """Behaviour: spreadsheets write one; a column's name does not begin with it."""
    (tmp_path / "a.tsv").write_text("sentence\tlabel\nfine\t1\n", encoding="utf-8-sig")
    assert list(_files.table(tmp_path, "a", tuple(ROW))) == [ROW]
    (tmp_path / "b.txt").write_text("Text", encoding="utf-8-sig")
    assert _files.text(str(tmp_path / "b.txt")) == "Text"


def test_a_damaged_archive_is_one_message(tmp_path: Path) -> None:
    """Behaviour: the end is there, the middle is not what was packed."""
    packed = bytearray(gzip.compress(b"sentence\tlabel\n" + b"fine\t1\n" * 1000))
    packed[20:30] = b"\xff" * 10
    (tmp_path / "a.tsv.gz").write_bytes(packed)
    with pytest.raises(InputError, match="cannot be read"):
        list(_files.table(tmp_path, "a", tuple(ROW)))
