"""Where our own Ray keeps its files."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from jepakit import _ray
from jepakit._ray import memory_folder, own_folder
from jepakit.errors import WriteError


def denied(*_: object, **__: object) -> NoReturn:
    raise PermissionError(13, "Permission denied")


def test_ray_s_sockets_lie_where_their_paths_are_short_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 30)
    long.mkdir()
    for place, taken in ((str(long), "/tmp"), ("/tmp/.", "/tmp/.")):
        monkeypatch.setattr(tempfile, "tempdir", place)
        with own_folder() as folder:
            socket_path = folder / "ray" / "session_2026-11-27_22-32-44_123456_4194304" / "sockets" / "plasma_store"
            assert len(str(socket_path)) <= 107
            assert folder.parent == Path(taken)
        assert not folder.exists()
    assert list(long.iterdir()) == []
    monkeypatch.setattr(tempfile, "mkdtemp", denied)
    with (
        pytest.raises(WriteError, match=r"Permission denied.*set TMPDIR to a folder whose path"),
        own_folder(),
    ):
        pass


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="Linux's")
def test_what_must_not_reach_a_disk_lies_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with memory_folder() as folder:
        assert folder is not None
        assert (folder.parent, folder.stat().st_mode & 0o777) == (Path("/dev/shm"), 0o700)
    assert not folder.exists()
    monkeypatch.setattr(tempfile, "mkdtemp", denied)
    with pytest.raises(WriteError, match=r"/dev/shm .*Permission denied.*: give it more"), memory_folder():
        pass
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    with (
        pytest.raises(WriteError, match=r"/dev/shm has 64 MB free, .* needs 200 .*choose --proxy haproxy"),
        memory_folder(),
    ):
        pass


def test_where_memory_is_no_folder_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ray, "_MEMORY", tmp_path / "none")
    with memory_folder() as folder:
        assert folder is None


def test_who_cleans_temporary_files_up_finds_ray_s_locked() -> None:
    """As systemd-tmpfiles does after ten days."""
    with own_folder() as folder:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
