"""What the pages say is what happens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_loop_of_ones_own_on_the_start_page_runs(tmp_path: Path) -> None:
    """Behaviour: the code of docs/start.md with transformers' Trainer, cut to two updates."""
    page = (ROOT / "docs" / "start.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert "max_steps=20" in code
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    code = code.replace("max_steps=20", "max_steps=2, save_strategy='no'") + (
        "\nassert trainer.state.global_step == 2\n"
        "assert all(p.grad is None for p in built.model.parameters() if not p.requires_grad)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_links_between_pages_lead_somewhere() -> None:
    """Behaviour: every relative link of every page."""
    links = [
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
    ]
    assert len(links) > 5
    missing = [f"{p.name}: {t}" for p, t in links if not (p.parent / t).exists()]
    assert missing == []


def test_commands_of_the_pages_exist() -> None:
    """Behaviour: each `lowres WORD` on a page is a command, and each recipe file is there."""
    from lowres.cli.main import COMMANDS

    text = "\n".join(page.read_text() for page in PAGES)
    words = set(re.findall(r"(?:^ {4}|`)lowres (\w+)", text, flags=re.MULTILINE))
    assert words <= {*COMMANDS}, words - {*COMMANDS}
    for path in set(re.findall(r"(recipes/[\w/.-]+\.yaml)", text)):
        assert (ROOT / path).exists(), path
