"""What is printed where the terminal, or the file it goes to, cannot show every letter."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import pytest

from lowres.core.record import Score
from lowres.memory import device as devices
from lowres.planning.plan import plan
from lowres.report import plan_table, table


@pytest.mark.parametrize(("encoding", "bars"), [("utf-8", "█"), ("ascii", "#")])
def test_a_plan_is_printed_in_any_encoding(
    encoding: str, bars: str, recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: no error in mid-output; the curve in letters that there are."""
    found = plan(recipe(), devices.load("cpu"))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    plan_table.print_plan(found)
    score = table.format_score(Score("valid", "accuracy", 0.5, 0.1, 10, None, 1))
    table.console().print(score)
    sys.stdout.flush()
    told = written.getvalue().decode(encoding)
    (curve,) = (line for line in told.splitlines() if line.startswith("one update"))
    assert bars in curve and "host memory" in told and "0.5000" in told
