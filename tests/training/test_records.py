"""The lock on a run's folder, held against real processes."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from tests.training.forked import start

from jepakit.errors import ConfigError
from jepakit_training.records import LOCK, _is_ours, locked


def hold(out: Path, *, with_a_loader: bool = False) -> None:
    with locked(out):
        if with_a_loader and os.fork() == 0:
            (out.parent / "loader").write_text(str(os.getpid()))
            time.sleep(120)
            os._exit(0)
        (out.parent / "held").touch()
        time.sleep(120)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or (path.name == "loader" and not path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_trainer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(hold, out, log=tmp_path / "log")
    wait_for(tmp_path / "held")
    with (
        pytest.raises(ConfigError, match=f"run is being trained on by process {process.pid} on {socket.gethostname()}"),
        locked(out),
    ):
        pass
    process.kill()
    process.join()
    with locked(out):
        assert (out / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert list(out.iterdir()) == []


def test_a_killed_trainers_loader_does_not_hold_the_folder(tmp_path: Path) -> None:
    """DataLoader's processes notice that their parent is gone only after seconds."""
    out = tmp_path / "run"
    process = start(hold, out, with_a_loader=True, log=tmp_path / "log")
    for name in ("held", "loader"):
        wait_for(tmp_path / name)
    loader = int((tmp_path / "loader").read_text())
    process.kill()
    process.join()
    try:
        with locked(out):
            os.kill(loader, 0)  # it does live
    finally:
        os.kill(loader, signal.SIGKILL)


def test_one_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()} on"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_lock_that_the_last_holder_removed_is_not_taken_for_one(tmp_path: Path) -> None:
    """Between opening and locking: what is locked then is a file without a name."""
    real, calls = fcntl.flock, iter(range(10))

    def remove_first(descriptor: int, how: int) -> None:
        if next(calls) == 0:
            (tmp_path / LOCK).unlink()
        real(descriptor, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", remove_first)
        with locked(tmp_path):
            patch.undo()
            with pytest.raises(ConfigError, match="is being trained on"), locked(tmp_path):
                pass


def test_only_the_first_rank_locks(tmp_path: Path) -> None:
    with locked(tmp_path), locked(tmp_path, enabled=False):
        assert (tmp_path / LOCK).exists()


def test_a_lock_is_no_stranger() -> None:
    assert _is_ours(LOCK)


def test_a_folder_that_cannot_be_made_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(ConfigError, match=r"cannot be written to \(.+\): name another --out"), locked(out):
            pass


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        with locked(tmp_path):
            pass
    assert "files cannot be locked" in capsys.readouterr().err
