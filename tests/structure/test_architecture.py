"""The house rules, and that breaking one turns a test red."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lowres
from tests.conftest import ROOT

FILES = sorted((ROOT / "lowres").rglob("*.py"))
LIMIT = 300


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()",
               "--no-cache", "--config", str(folder / "setup.cfg")]  # fmt: skip
    return subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True,
    )  # fmt: skip


def copy_of_the_package(target: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(ROOT / "lowres", target / "lowres", ignore=ignored)
    shutil.copy(ROOT / "setup.cfg", target)
    return target


def test_imports_go_down_only_and_bridges_alone_import_the_packages() -> None:
    """Behaviour: the contracts of setup.cfg."""
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: 2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    "file, line",
    [
        ("core/units.py", "from lowres.making import build"),
        ("methods/lora.py", "from lowres.methods import bitfit"),
        ("methods/lora.py", "import peft"),
        ("making/data.py", "from lowres.cli import main"),
        ("planning/plan.py", "from lowres.run import execute"),
        ("recommend/fit.py", "from lowres.run import execute"),
        ("run/execute.py", "from lowres.recommend import fit"),
    ],
)
def test_a_planted_upward_or_outside_import_breaks_a_contract(
    file: str, line: str, tmp_path: Path
) -> None:
    """Behaviour: the check above can fail."""
    folder = copy_of_the_package(tmp_path)
    planted = folder / "lowres" / file
    planted.write_text(planted.read_text() + f"\n\n{line}\n")
    if "methods import" in line:
        assert parts_knowing_parts(folder / "lowres")
    else:
        assert lint(folder).returncode != 0


def parts_knowing_parts(package: Path) -> list[str]:
    """Part files that import another part of any family (underscored helpers are no parts)."""
    families = {"tasks", "methods", "freezing", "objectives", "optimizers", "levers", "procedures"}
    out = []
    for path in package.rglob("*.py"):
        if path.parent.name not in families:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            words = node.module.split(".")
            if words[0] != "lowres" or len(words) < 2 or words[1] not in families:
                continue
            names = words[2:3] or [alias.name for alias in node.names]
            out += [f"{path.name}: {n}" for n in names if not n.startswith("_")]
    return out


def test_no_part_knows_another() -> None:
    """Behaviour."""
    assert parts_knowing_parts(ROOT / "lowres") == []


def test_files_stay_readable() -> None:
    """Behaviour: a file over the limit holds two ideas."""
    assert len(FILES) > 50
    sizes = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in FILES}
    assert {n: s for n, s in sizes.items() if s > LIMIT} == {}


def test_every_module_says_what_it_is_and_every_part_names_its_source() -> None:
    """Behaviour: module docstrings; `Paper:` in each part, or for tasks and grammars a source."""
    from lowres.core import registry

    for path in FILES:
        if path.name != "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), path
    for family in registry.FAMILIES:
        for name in registry.names(family):
            text = registry.docstring(family, name)
            assert "Paper:" in text or "Source:" in text, (family, name)
            assert len(text.partition("\n")[0]) < 110


def test_the_public_names_are_the_intended_ones() -> None:
    """Behaviour."""
    assert lowres.__all__ == ["LowresError", "__version__", "build", "load_recipe", "run"]
    assert all(callable(getattr(lowres, n)) for n in lowres.__all__ if n != "__version__")
    assert not callable(lowres.__version__)


def test_types_hold_outside_the_bridges() -> None:
    """Behaviour: mypy in strict mode, as configured in setup.cfg."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout


def test_style_holds() -> None:
    """Behaviour: flake8 as configured in setup.cfg, ruff's formatter and linter in ruff.toml."""
    done = subprocess.run(
        [sys.executable, "-m", "flake8", "lowres", "tests", "benchmarks", "recipes"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    for arguments in (["check", "-q"], ["format", "--check", "-q"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "lowres", "tests", "benchmarks", "recipes"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout


def test_no_pickle_and_no_remote_code_by_default() -> None:
    """Behaviour: nothing outside the tests reads a pickle or trusts remote code unasked."""
    for path in FILES:
        text = path.read_text()
        assert "pickle" not in text.replace("No pickle", ""), path
        assert "trust_remote_code=True" not in text, path
