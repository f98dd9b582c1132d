"""docs/adding.md, followed literally; and a method that freezes wrongly is caught."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

WRONG = '''"""Train everything, whatever the freezing says.

Paper: none.
"""

from __future__ import annotations

from lowres.core.method import Method
from lowres.core.parts import part


@part
class Wrong(Method):
    learning_rate_hint = (1e-4, 1e-3)
    mergeable = True

    def apply(self, model, blocks):
        return model.requires_grad_(True)

    def merge(self, model):
        return model
'''


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of package, tests and recipes that a new file can be dropped into."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("lowres", "tests", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "ruff.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def contracts(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-vv", *arguments],
        cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True, text=True,
    )  # fmt: skip


def test_the_page_on_adding_a_method_works_as_written(checkout: Path) -> None:
    """Behaviour: the file of the page, dropped in, is listed, shown and takes every contract."""
    page = (ROOT / "docs" / "adding.md").read_text()
    (path,) = re.findall(r"Write `(lowres/methods/\w+\.py)`", page)
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (checkout / path).write_text(code)
    name = Path(path).stem
    for words, told in (
        (["list", "methods"], name),
        (["show", "method", name], "class: selective"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "lowres", *words],
            cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert told in done.stdout, done.stderr
    done = contracts(checkout, "tests/contracts/test_methods.py", "-k", f"{name} and encoder",
                     "-m", "not gpu")  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.findall(rf"::(test_\w+)\[.*{name}.*\] PASSED", done.stdout)
    assert len(set(passed)) >= 6, done.stdout[-3000:]
    (checkout / path).unlink()


def test_a_method_that_ignores_the_freezing_turns_the_contract_red(checkout: Path) -> None:
    """Behaviour: the freezing contract can fail."""
    planted = checkout / "lowres" / "methods" / "wrong.py"
    planted.write_text(WRONG)
    done = contracts(checkout, "tests/contracts/test_freezing.py", "-k", "wrong and prefix",
                     "-m", "not gpu")  # fmt: skip
    planted.unlink()
    assert done.returncode == 1
    assert "FAILED tests/contracts/test_freezing.py::test_nothing_is_kept" in done.stdout
