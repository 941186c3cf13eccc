"""Where our own Ray keeps its files."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from jepakit._ray import own_folder
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


def test_what_must_not_reach_a_disk_lies_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with own_folder(in_memory=True) as folder:
        assert folder.parent == Path("/dev/shm")
    assert not folder.exists()
    monkeypatch.setattr(tempfile, "mkdtemp", denied)
    with (
        pytest.raises(WriteError, match=r"/dev/shm .*Permission denied.*: make room there"),
        own_folder(in_memory=True),
    ):
        pass


def test_who_cleans_temporary_files_up_finds_ray_s_locked() -> None:
    """As systemd-tmpfiles does after ten days."""
    with own_folder() as folder:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
