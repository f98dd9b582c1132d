"""Commands called in this process, which spares each of them the start of Python and torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from lowres.cli.main import main


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Calls `lowres ...` as `main` does it; gives exit code, output and error output."""
    monkeypatch.delenv("COLUMNS", raising=False)  # as a pipe sees it

    def call(*words: object) -> subprocess.CompletedProcess[str]:
        told = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", ["lowres", *told])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(told, int(ended.value.code or 0), out, err)

    return call
