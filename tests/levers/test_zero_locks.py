"""A build that died must not hold up later runs in silence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lowres.bridges import left_locks
from lowres.bridges.left_locks import stop_at_left_locks
from lowres.core.errors import LowresError


@pytest.mark.parametrize("where", ["async_io", "py311_cpu/async_io"])
def test_a_lock_that_nobody_holds_is_named_and_one_that_is_held_is_waited_for(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: torch's own lock, as it is while a build goes on and after its process died."""
    from torch.utils.file_baton import FileBaton

    monkeypatch.setattr(left_locks, "GIVEN_BACK_SECONDS", 0)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / where
    folder.mkdir(parents=True)
    stop_at_left_locks()
    baton = FileBaton(str(folder / "lock"))
    assert baton.try_acquire()
    stop_at_left_locks()
    os.close(baton.fd)  # as the system does when a process is killed
    with pytest.raises(LowresError, match=r"lock' was left by a build that died.*delete it"):
        stop_at_left_locks()


@pytest.mark.parametrize("taken_again", [False, True])
def test_a_lock_that_is_just_given_back_is_no_left_one(
    taken_again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: closed when it is looked for, then deleted; or another build's by then, that
    gives it back in its turn."""
    from torch.utils.file_baton import FileBaton

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "async_io").mkdir()
    baton = FileBaton(str(tmp_path / "async_io" / "lock"))
    assert baton.try_acquire()
    os.close(baton.fd)

    def meanwhile(_: float) -> None:
        os.remove(baton.lock_file_path)
        if taken_again:
            other = FileBaton(baton.lock_file_path)
            assert other.try_acquire()
            os.close(other.fd)

    monkeypatch.setattr(left_locks.time, "sleep", meanwhile)
    stop_at_left_locks()
