"""What a record says of the checkout that it was made with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import lowres
from lowres.run import environment


def test_a_change_anywhere_in_the_package_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: in whichever folder, also a file that is new; what lies beside the package is not
    what runs."""
    part = tmp_path / "lowres" / "methods" / "lora.py"
    part.parent.mkdir(parents=True)
    part.touch()
    monkeypatch.setattr(lowres, "__file__", str(tmp_path / "lowres" / "__init__.py"))
    assert environment.commit() == {"commit": None, "dirty": None}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "notes").touch()
    clean = environment.commit()
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    part.write_text("changed")
    assert environment.commit() == clean | {"dirty": True}
    part.write_text("")
    (part.parent / "new.py").touch()
    assert environment.commit() == clean | {"dirty": True}


def test_a_checkout_that_only_surrounds_the_package_is_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: installed into an environment within a user's own project."""
    (tmp_path / "venv" / "lowres").mkdir(parents=True)
    (tmp_path / "venv" / "lowres" / "__init__.py").touch()
    (tmp_path / ".gitignore").write_text("venv\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "theirs"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(lowres, "__file__", str(tmp_path / "venv" / "lowres" / "__init__.py"))
    assert environment.commit() == {"commit": None, "dirty": None}
