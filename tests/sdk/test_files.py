"""Replacing files: two writers never collide, and whoever could read the old file can read the new one."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from jepakit._files import as_path, fsync, making_folder, reason_of, replacing


def test_two_writers_of_one_process_id_do_not_write_into_each_others_file(tmp_path: Path) -> None:
    path = tmp_path / "shared.npz"
    with replacing(path) as first:
        first.write(b"first")
        with replacing(path) as second:
            second.write(b"2nd")
        assert path.read_bytes() == b"2nd"
    assert path.read_bytes() == b"first"
    assert [file.name for file in tmp_path.iterdir()] == ["shared.npz"]


def test_nothing_is_left_of_a_block_that_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with replacing(tmp_path / "a") as file:
            file.write(b"half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_the_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "a") as file:
            file.write(b"whole")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_tilde_is_the_home_folder_and_an_unknown_home_is_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("~/a.npz", "out") == as_path(Path("~/a.npz"), "out") == tmp_path / "a.npz"
    assert as_path("~nobody-of-this-name/a", "out") == Path("~nobody-of-this-name/a")
    assert as_path("a/~/b", "out") == Path("a/~/b")


def test_a_folder_has_its_name_when_it_is_whole_and_nothing_is_left_of_a_block_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "whole"

    def fail() -> None:
        with making_folder(path) as folder:
            (folder / "a").write_bytes(b"half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert list(tmp_path.iterdir()) == []
    with making_folder(path) as folder:
        (folder / "a").write_bytes(b"whole")
        assert not path.exists()
    with pytest.raises(OSError, match="not empty"), making_folder(path):
        pass
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*")] == ["whole", "whole/a"]


def test_what_a_folder_holds_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flushed = tmp_path / "whole", list[tuple[Path, bool]]()

    def record(descriptor: int) -> None:
        flushed.append((Path(f"/proc/self/fd/{descriptor}").readlink(), path.exists()))

    monkeypatch.setattr(os, "fsync", record)
    with making_folder(path) as folder:
        (folder / "weights.bin").write_bytes(b"1")
    assert flushed == [(folder / "weights.bin", False), (folder, False), (tmp_path, True)]


def test_the_reason_of_an_error_that_the_system_did_not_name_is_its_own_words() -> None:
    assert reason_of(OSError(28, "No space left on device", "a")) == "No space left on device"
    assert reason_of(OSError("encoder error")) == "encoder error"


def test_on_windows_a_folder_is_not_flushed_and_a_file_is_opened_for_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a folder cannot be opened, and what is open for reading alone not be flushed."""
    file = tmp_path / "a"
    file.touch()
    real, opened = os.open, []

    def noticing(path: Path, flags: int, *args: Any, **options: Any) -> int:
        opened.append((path, flags))
        return real(path, flags, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", noticing)
        fsync(tmp_path)
        fsync(file)
        patch.setattr(os, "name", "nt")
        fsync(tmp_path)
        fsync(file)
    assert opened == [(tmp_path, os.O_RDONLY), (file, os.O_RDONLY), (file, os.O_RDWR)]
